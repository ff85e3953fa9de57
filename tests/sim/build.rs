//! Lets the binaries and tests of this crate find libtorch where it was linked.

fn main() {
    println!("cargo:rerun-if-env-changed=DEP_THAW_TORCH_LIB_DIR");
    if let Ok(folder) = std::env::var("DEP_THAW_TORCH_LIB_DIR") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
