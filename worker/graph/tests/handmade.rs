//! Archives made by hand: odd, cut short, lying, or of another kind.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::Write;
use std::path::PathBuf;

use serde_json::{Value, json};
use thaw_graph::Archive;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A graph `x -> linear`, as the exporter would write it.
fn program() -> Value {
    let known = |sizes: &[i64]| sizes.iter().map(|size| json!({"as_int": size})).collect::<Vec<_>>();
    let meta = |sizes: &[i64], strides: &[i64]| {
        json!({"dtype": 7, "sizes": known(sizes), "requires_grad": true, "device": {"type": "cpu", "index": null}, "strides": known(strides),
               "storage_offset": {"as_int": 0}, "layout": 7})
    };
    let tensor = |name: &str| json!({"as_tensor": {"name": name}});
    json!({
        "graph_module": {
            "graph": {
                "inputs": [tensor("p_w"), tensor("x")],
                "outputs": [tensor("linear")],
                "nodes": [{
                    "target": "torch.ops.aten.linear.default",
                    "inputs": [{"name": "input", "arg": tensor("x"), "kind": 1}, {"name": "weight", "arg": tensor("p_w"), "kind": 1}],
                    "outputs": [tensor("linear")],
                    "metadata": {"nn_module_stack": "L__self__,,M;L__self__fc,fc,torch.nn.modules.linear.Linear"},
                    "name": "linear",
                }],
                "tensor_values": {"p_w": meta(&[3, 2], &[2, 1]), "x": meta(&[4, 2], &[2, 1]), "linear": meta(&[4, 3], &[3, 1])},
                "sym_int_values": {},
            },
            "signature": {
                "input_specs": [
                    {"parameter": {"arg": {"name": "p_w"}, "parameter_name": "fc.weight"}},
                    {"user_input": {"arg": tensor("x")}},
                ],
                "output_specs": [{"user_output": {"arg": tensor("linear")}}],
            },
        },
        "schema_version": {"major": 8, "minor": 17},
        "range_constraints": {},
        "guards_code": [],
    })
}

fn config() -> Value {
    let meta = program()["graph_module"]["graph"]["tensor_values"]["p_w"].clone();
    json!({"config": {"fc.weight": {"path_name": "weight_0", "is_param": true, "use_pickle": false, "tensor_meta": meta}}})
}

struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn archive(&self, program: &Value, config: &Value, weight: &[u8]) -> PathBuf {
        self.zip(&[
            ("m/archive_format", b"pt2"),
            ("m/models/model.json", program.to_string().as_bytes()),
            ("m/data/weights/weight_0", weight),
            ("m/data/weights/model_weights_config.json", config.to_string().as_bytes()),
            ("m/data/constants/model_constants_config.json", br#"{"config": {}}"#),
        ])
    }

    fn zip(&self, entries: &[(&str, &[u8])]) -> PathBuf {
        let path = self.folder.path().join("m.pt2");
        let mut zip = ZipWriter::new(std::fs::File::create(&path).unwrap());
        for (name, bytes) in entries {
            zip.start_file(*name, SimpleFileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        path
    }
}

fn refusal(path: &std::path::Path) -> String {
    let error = Archive::open(path).and_then(|archive| archive.graph()).unwrap_err();
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

#[test]
fn a_sound_archive_opens() {
    let files = Files::new();
    let archive = Archive::open(&files.archive(&program(), &config(), &[7; 24])).unwrap();
    assert_eq!(archive.weight_bytes("fc.weight").unwrap(), [7; 24]);
    assert!(archive.weight_bytes("fc.bias").unwrap_err().to_string().contains("has no tensor `fc.bias`"));
    let graph = archive.graph().unwrap();
    assert_eq!((graph.nodes.len(), graph.parameters.len()), (1, 1));
    let twin = Files::new();
    let twin = Archive::open(&twin.archive(&program(), &config(), &[8; 24])).unwrap();
    assert_ne!(archive.fingerprint().unwrap(), twin.fingerprint().unwrap());
}

#[test]
fn sizes_of_inner_tensors_become_arithmetic_on_input_sizes() {
    let files = Files::new();
    let mut program = program();
    let symbol = "Symbol('s0', positive=True, integer=True)";
    let half = format!("Add(FloorDiv({symbol}, Integer(2)), Mul(Integer(-1), {symbol}))");
    let size = |text: &str| json!({"as_expr": {"expr_str": text, "hint": {"as_int": 4}}});
    let graph = &mut program["graph_module"]["graph"];
    for value in ["x", "linear"] {
        graph["tensor_values"][value]["sizes"][0] = size(symbol);
    }
    graph["sym_int_values"]["inner"] = size(&half);
    graph["tensor_values"]["full"] = graph["tensor_values"]["linear"].clone();
    let argument = |name: &str, argument: Value| json!({"name": name, "arg": argument, "kind": 1});
    let tensor = |name: &str| json!({"as_tensor": {"name": name}});
    let nodes = graph["nodes"].as_array_mut().unwrap();
    nodes.push(json!({"target": "torch.ops.aten.sym_size.int", "name": "inner", "outputs": [{"as_sym_int": {"as_name": "inner"}}],
        "inputs": [argument("self", tensor("linear")), argument("dim", json!({"as_int": 0}))]}));
    nodes.push(json!({"target": "torch.ops.aten.mul.Scalar", "name": "full", "outputs": [tensor("full")],
        "inputs": [argument("self", tensor("linear")), argument("other", json!({"as_sym_int": {"as_name": "inner"}}))]}));
    graph["outputs"] = json!([tensor("full")]);
    program["graph_module"]["signature"]["output_specs"] = json!([{"user_output": {"arg": tensor("full")}}]);
    let graph = Archive::open(&files.archive(&program, &config(), &[0; 24])).unwrap().graph().unwrap();
    let operators: Vec<&str> = graph.nodes.iter().map(|node| node.operator.as_str()).collect();
    assert_eq!(
        operators,
        ["aten::linear", "aten::sym_size", "python::floordiv", "python::mul", "python::add", "aten::mul"]
    );
    let cut = thaw_graph::segment(&graph, &[]).unwrap();
    assert_eq!(cut.prologue.len(), 4, "no number depends on a parameter");
}

#[test]
fn other_schemas_and_formats_are_refused() {
    let files = Files::new();
    let mut newer = program();
    newer["schema_version"]["major"] = json!(9);
    assert!(refusal(&files.archive(&newer, &config(), &[0; 24])).contains("schema 9.17 and this version reads 8.x"));
    assert!(refusal(&files.zip(&[("m/something", b"")])).contains("not a .pt2 archive"));
    assert!(refusal(&files.zip(&[("serialized_exported_program.json", b"{}")])).contains("PyTorch 2.7 or older"));
    let compiled: [(&str, &[u8]); 2] = [("m/archive_format", b"pt2"), ("m/data/aotinductor/model/a.so", b"")];
    assert!(refusal(&files.zip(&compiled)).contains("compiled model without a graph"));
    let path = files.folder.path().join("text.pt2");
    std::fs::write(&path, "hello").unwrap();
    assert!(refusal(&path).contains("not a zip file"));
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let files = Files::new();
    let path = files.archive(&program(), &config(), &[0; 24]);
    let bytes = std::fs::read(&path).unwrap();
    for length in 0..bytes.len() {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert!(Archive::open(&path).is_err(), "{length} bytes");
    }
}

#[test]
fn a_changed_byte_in_a_weight_is_found() {
    let files = Files::new();
    let path = files.archive(&program(), &config(), &[0xAB; 24]);
    let mut bytes = std::fs::read(&path).unwrap();
    let start = bytes.windows(24).position(|window| window == [0xAB; 24]).unwrap();
    bytes[start + 5] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = Archive::open(&path).unwrap().weight_bytes("fc.weight").unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[test]
fn tensors_that_lie_about_their_size_are_refused() {
    let files = Files::new();
    assert!(
        refusal(&files.archive(&program(), &config(), &[0; 20])).contains("needs 24 bytes and the archive holds 20")
    );
    let mut huge = config();
    huge["config"]["fc.weight"]["tensor_meta"]["sizes"] = json!([{"as_int": i64::MAX}, {"as_int": 2}]);
    assert!(refusal(&files.archive(&program(), &huge, &[0; 24])).contains("overflows"));
    let mut pickled = config();
    pickled["config"]["fc.weight"]["use_pickle"] = json!(true);
    assert!(refusal(&files.archive(&program(), &pickled, &[0; 24])).contains("pickles can run code"));
    let mut other = config();
    other["config"]["fc.weight"]["tensor_meta"]["sizes"] = json!([{"as_int": 2}, {"as_int": 3}]);
    other["config"]["fc.weight"]["tensor_meta"]["strides"] = json!([{"as_int": 3}, {"as_int": 1}]);
    assert!(refusal(&files.archive(&program(), &other, &[0; 24])).contains("differs between graph and archive"));
}

#[test]
fn graphs_that_cannot_run_are_refused_by_name() {
    let files = Files::new();
    let refused = |edit: &dyn Fn(&mut Value)| {
        let mut program = program();
        edit(&mut program);
        refusal(&files.archive(&program, &config(), &[0; 24]))
    };
    let node =
        |program: &mut Value, target: &str| program["graph_module"]["graph"]["nodes"][0]["target"] = json!(target);
    assert!(
        refused(&|program| node(program, "torch.ops.higher_order.while_loop"))
            .contains("control flow operator `while_loop`")
    );
    assert!(
        refused(&|program| node(program, "torch.ops.higher_order.flex_attention"))
            .contains("higher-order operator `flex_attention`")
    );
    assert!(refused(&|program| node(program, "builtins.print")).contains("the target `builtins.print`"));
    let unbacked = json!({"as_expr": {"expr_str": "Symbol('u0', integer=True)", "hint": null}});
    let text =
        refused(&|program| program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0] = unbacked.clone());
    assert!(text.contains("`u0` of `x` depends on data"), "{text}");
    let text = refused(&|program| program["graph_module"]["graph"]["tensor_values"]["x"]["dtype"] = json!(10));
    assert!(text.contains("the number 10 for a dtype at `x`"), "{text}");
    let text = refused(&|program| {
        program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = json!({"as_complex": {"real": 0, "imag": 1}})
    });
    assert!(text.contains("of the kind `complex number`"), "{text}");
    let text = refused(&|program| {
        program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"]["as_tensor"]["name"] = json!("y")
    });
    assert!(text.contains("reads `y`, which nothing makes"), "{text}");
    let text = refused(&|program| program["graph_module"]["signature"]["output_specs"] = json!([]));
    assert!(text.contains("returns 0 values"), "{text}");
}
