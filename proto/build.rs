//! Compiles `thaw/v1/*.proto` without a `protoc`: messages, clients, servers, and a descriptor set that keeps the comments.

use prost::Message as _;
use std::path::PathBuf;
use std::{env, error, fs};

const PROTOS: [&str; 5] =
    ["thaw/v1/spec.proto", "thaw/v1/plan.proto", "thaw/v1/run.proto", "thaw/v1/worker.proto", "thaw/v1/cluster.proto"];

fn main() -> Result<(), Box<dyn error::Error>> {
    println!("cargo::rerun-if-changed=thaw");
    let descriptors = protox::Compiler::new(["."])?
        .include_source_info(true)
        .include_imports(true)
        .open_files(PROTOS)?
        .file_descriptor_set();
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("thaw_v1.bin"), descriptors.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    // `prost::Name`: the text reader finds a message's descriptor by its name.
    config.enable_type_names();
    // Shared by all proposals of a gang.
    config.extern_path(".thaw.v1.Peers", "crate::peers::Peers");
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
