//! Frozen prefixes of exported models: entering at a boundary computes what running from the inputs computes, and a sample's part of a
//! prefix does not depend on its companions.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;

use common::{alone, join, python_reference, read_safetensors, relative_difference, same_bits, text};
use thaw_graph::{Archive, Boundary, InputNeed};
use thaw_torch::model::{BatchNorm, Entry, Options};
use thaw_torch::tch::{Device, Tensor};
use thaw_torch::{Precision, SegmentedModel, runtime};

fn load(folder: &Path) -> SegmentedModel {
    let archive = Archive::open(&join(folder, "model.pt2")).unwrap();
    let graph = thaw_graph::segment(&archive.graph().unwrap(), &[]).unwrap();
    let mut source = |name: &str| {
        let payload = archive.payload(name)?;
        Ok((payload.dtype, payload.shape.clone(), archive.weight_bytes(name)?))
    };
    SegmentedModel::new(graph, &mut source, Options::new(Precision::Fp32, Device::Cpu)).unwrap()
}

fn boundaries(model: &SegmentedModel) -> Vec<Boundary> {
    (1..model.groups().len()).map(|segment| thaw_graph::boundary(model.graph(), segment).unwrap()).collect()
}

fn gradients(model: &mut SegmentedModel, entry: Entry<'_>, labels: &Tensor) -> Vec<Tensor> {
    let mut flats = Vec::new();
    runtime::manual_seed(3).unwrap();
    let output = model.train_step(entry, labels, 1.0, &mut |_, flat| flats.push(flat.copy())).unwrap();
    flats.push(output.loss);
    flats
}

fn check(name: &str, needs: &[InputNeed]) {
    let _alone = alone();
    runtime::set_num_threads(1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    if !python_reference(&["model", name, text(folder.path()), "fp32", "channels_last"]) {
        return;
    }
    let expected = read_safetensors(&join(folder.path(), "expected.safetensors"));
    let mut model = load(folder.path());
    // Running statistics must not move between the comparisons.
    model.set_batch_norm(BatchNorm::FrozenStatistics);
    let inputs: Vec<Tensor> =
        (0..).map_while(|index| expected.get(&format!("input/{index}"))).map(Tensor::shallow_clone).collect();
    let labels = &expected["labels"];
    let batch = inputs[0].size()[0];
    let boundaries = boundaries(&model);
    let found: Vec<InputNeed> = boundaries.iter().map(|boundary| boundary.inputs).collect();
    assert!(needs.iter().all(|need| found.contains(need)), "{found:?}");
    let all: Vec<&Boundary> = boundaries.iter().collect();
    let values = model.prefix(&inputs, &all).unwrap();
    let logits = model.forward(&inputs).unwrap();
    let order: Vec<i64> = (0..batch).rev().collect();
    let turned: Vec<Tensor> = inputs.iter().map(|input| input.index_select(0, &Tensor::from_slice(&order))).collect();
    let turned = model.prefix(&turned, &all).unwrap();
    let groups = model.groups().len();
    for ((boundary, values), turned) in boundaries.iter().zip(&values).zip(&turned) {
        let place = format!("{name}, below {}", model.groups()[boundary.segment].name);
        for (value, turned) in values.iter().zip(turned) {
            let back = turned.index_select(0, &Tensor::from_slice(&order));
            let difference = relative_difference(&back, value);
            assert!(same_bits(&back, value), "{place}: a sample depends on its companions, {difference:e} relative");
        }
        let given = Some(inputs.as_slice()).filter(|_| boundary.inputs == InputNeed::Contents);
        let entry = Entry::Cut { boundary, values, inputs: given };
        let found = model.forward(entry).unwrap();
        assert!(
            same_bits(&found, &logits),
            "{place}: logits differ by {:e} relative",
            relative_difference(&found, &logits)
        );
        model.set_trainable(&(boundary.segment..groups).collect::<Vec<_>>()).unwrap();
        let whole = gradients(&mut model, Entry::Inputs(&inputs), labels);
        let entered = gradients(&mut model, entry, labels);
        assert!(whole.iter().zip(&entered).all(|(left, right)| same_bits(left, right)), "{place}: other gradients");
        model.set_trainable(&[]).unwrap();
    }
}

#[test]
fn resnet18() {
    check("resnet18", &[InputNeed::Nothing]);
}

#[test]
fn minilm() {
    check("minilm", &[InputNeed::Nothing, InputNeed::Contents]);
}

#[test]
fn vision_transformers() {
    check("vit_tiny", &[]);
    check("vit_b_16", &[]);
}

#[test]
fn convnext_with_stochastic_depth() {
    check("convnext", &[]);
}
