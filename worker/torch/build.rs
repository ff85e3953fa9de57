//! Compiles the C++ file that calls libtorch's dispatcher, and tells dependents where libtorch lies.

use std::env;
use std::path::{Path, PathBuf};

/// libtorch's root: `LIBTORCH`, relative to the workspace where it is not absolute.
fn libtorch() -> PathBuf {
    let path =
        PathBuf::from(env::var("LIBTORCH").expect("LIBTORCH is set: run `make setup`, or point it at a libtorch 2.11"));
    if path.is_absolute() {
        return path;
    }
    let manifest = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    Path::new(&manifest).join("../..").join(path)
}

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    println!("cargo:rerun-if-changed=csrc");
    let root = libtorch();
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    // Always optimised: it runs between every two operators.
    cc::Build::new()
        .cpp(true)
        .pic(true)
        .opt_level(3)
        .debug(false)
        .warnings(false)
        .flag("-std=c++17")
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .define("GLOG_USE_GLOG_EXPORT", None)
        .include(root.join("include"))
        .include(root.join("include/torch/csrc/api/include"))
        .files(["csrc/shim.cpp", "csrc/allocator.cpp", "csrc/cast.cpp", "csrc/kernels.cpp"])
        .compile("thaw_torch");
    println!("cargo:rustc-link-search=native={}", root.join("lib").display());
    for library in ["torch_cpu", "torch", "c10"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    // The linked folder may hold symbolic links to a few of the libraries only; at run time the others must be found beside the real ones.
    let library = root.join("lib/libtorch_cpu.so");
    let real = library
        .canonicalize()
        .unwrap_or_else(|error| panic!("cannot find {}: {error}; run `make setup`", library.display()));
    let folder = real.parent().expect("a file lies in a folder").display();
    println!("cargo:lib_dir={folder}");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
}
