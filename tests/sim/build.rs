//! Takes the operating system's chance from the program.

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    // Nothing of it is named by other objects but weakly, so the whole of it is asked for.
    cc::Build::new().file("csrc/getrandom.c").cargo_metadata(false).compile("thaw_sim_chance");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    println!("cargo:rustc-link-search=native={out}");
    println!("cargo:rustc-link-lib=static:+whole-archive=thaw_sim_chance");
}
