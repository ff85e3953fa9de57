//! Fused updates and clipping over flat buffers against `torch.optim`, bit for bit.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{join, python_reference, read_safetensors, same_bits, text};
use thaw_torch::model::GroupParameters;
use thaw_torch::optim::{AdamWSettings, AdamWState, Optimizers, SgdSettings, SgdState, clip_by_global_norm, norm};
use thaw_torch::runtime;
use thaw_torch::tch::{Device, Kind, Tensor};

const ELEMENTS: i64 = 1039;
const DECAY_ELEMENTS: usize = 624;
const RATES: [f64; 5] = [1e-3, 2e-3, 5e-4, 1e-2, 3e-3];

fn group(flat: &Tensor) -> GroupParameters {
    GroupParameters {
        name: "g".to_owned(),
        flat: flat.copy(),
        decay_elements: DECAY_ELEMENTS,
        parameters: Vec::new(),
        buffers: Vec::new(),
    }
}

#[test]
fn updates_equal_torch_optim() {
    runtime::set_num_threads(1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    runtime::manual_seed(3).unwrap();
    let flat = Tensor::randn([ELEMENTS], (Kind::Float, Device::Cpu));
    let gradients: Vec<Tensor> = RATES.iter().map(|_| Tensor::randn([ELEMENTS], (Kind::Float, Device::Cpu))).collect();
    let names: Vec<String> = (0..RATES.len()).map(|step| format!("gradient/{step}")).collect();
    let mut given: Vec<(&str, &Tensor)> = names.iter().map(String::as_str).zip(&gradients).collect();
    given.push(("flat", &flat));
    Tensor::write_safetensors(&given, join(folder.path(), "given.safetensors")).unwrap();
    let case = |name: &str, kind: &str, clip: Option<f64>, nesterov: bool| {
        serde_json::json!({"name": name, "kind": kind, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum":
            if name == "plain" { 0.0 } else { 0.9 }, "nesterov": nesterov, "clip": clip})
    };
    let cases = [
        case("adamw", "adamw", None, false),
        case("clipped", "adamw", Some(2.0), false),
        case("momentum", "sgd", None, false),
        case("nesterov", "sgd", None, true),
        case("plain", "sgd", None, false),
    ];
    let settings = serde_json::json!({"rates": RATES, "decay_elements": DECAY_ELEMENTS, "cases": cases});
    std::fs::write(join(folder.path(), "given.json"), settings.to_string()).unwrap();
    if !python_reference(&["optim", text(folder.path())]) {
        return;
    }
    let expected = read_safetensors(&join(folder.path(), "expected.safetensors"));

    let optimizers = Optimizers::resolve().unwrap();
    let settings = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    for name in ["adamw", "clipped"] {
        let group = group(&flat);
        let mut state = AdamWState::zeros_for(&group).unwrap();
        for (step, (rate, gradient)) in RATES.iter().zip(&gradients).enumerate() {
            let gradient = gradient.copy();
            if name == "clipped" {
                let own = norm(&gradient).unwrap();
                let norm = clip_by_global_norm(&[&gradient], &[own], 2.0).unwrap();
                let index = i64::try_from(step).unwrap();
                assert!((norm - expected["clipped/norms"].double_value(&[index])).abs() < 1e-12);
            }
            optimizers.adamw(&settings, *rate, &group, &gradient, &mut state).unwrap();
        }
        assert!(same_bits(&group.flat, &expected[name]), "{name}");
        assert!((state.step.double_value(&[]) - 5.0).abs() < f64::EPSILON);
    }
    for (name, momentum, nesterov) in [("momentum", 0.9, false), ("nesterov", 0.9, true), ("plain", 0.0, false)] {
        let settings = SgdSettings { momentum, dampening: 0.0, nesterov, weight_decay: 0.01 };
        let group = group(&flat);
        let mut state = SgdState::zeros_for(&group, &settings).unwrap();
        for (rate, gradient) in RATES.iter().zip(&gradients) {
            optimizers.sgd(&settings, *rate, &group, &gradient.copy(), &mut state).unwrap();
        }
        assert!(same_bits(&group.flat, &expected[name]), "{name}");
    }
}
