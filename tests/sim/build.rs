//! Lets the program find libtorch, which the agent's crate is linked to, and takes the operating system's chance from it.

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=DEP_THAW_TORCH_LIB_DIR");
    if let Ok(folder) = std::env::var("DEP_THAW_TORCH_LIB_DIR") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
    // Nothing of it is named by other objects but weakly, so the whole of it is asked for.
    cc::Build::new().file("csrc/getrandom.c").cargo_metadata(false).compile("thaw_sim_chance");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    println!("cargo:rustc-link-search=native={out}");
    println!("cargo:rustc-link-lib=static:+whole-archive=thaw_sim_chance");
}
