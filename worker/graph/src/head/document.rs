//! The archive's JSON, edited: parameters, buffers and nodes added and removed in every place that names them.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Error, NewParameter};
use crate::archive::{Archive, WEIGHTS};
use crate::init::Init;
use crate::ir::DType;
use crate::modules::HEAD_CLASS;
use crate::payload::Payload;
use crate::schema;

/// One module of a head; sizes are those of the last dimension.
pub(super) enum Layer {
    Linear { inputs: i64, outputs: i64 },
    BatchNorm { size: i64 },
    Relu { size: i64 },
    Dropout { size: i64, probability: f64 },
}

/// Where nodes go and what their modules are called.
pub(super) struct Place {
    /// Index of the next node.
    index: usize,
    /// The module stack down to the head, as metadata text.
    stack: String,
    prefix: String,
    pub has_bias: bool,
    /// Parameter names to keep where the head is one linear layer.
    pub single_names: Option<(String, Option<String>)>,
}

impl Place {
    /// In place of a node.
    pub(super) fn at(index: usize, node: Value, module: &str) -> Self {
        let stack = node["metadata"]["nn_module_stack"].as_str().unwrap_or_default();
        let mut items: Vec<&str> = stack.split(';').filter(|item| !item.is_empty()).collect();
        if module.is_empty() {
            return Self::new(index, &items.join(";"), "head");
        }
        items.pop();
        Self::new(index, &items.join(";"), module)
    }

    /// After the last node.
    pub(super) fn at_end(index: usize, root_class: &str, prefix: &str) -> Self {
        Self::new(index, &format!("L__self__,,{root_class}"), prefix)
    }

    fn new(index: usize, above: &str, prefix: &str) -> Self {
        let separator = if above.is_empty() { "" } else { ";" };
        let stack = format!("{above}{separator}{},{prefix},{HEAD_CLASS}", stack_key(prefix));
        Self { index, stack, prefix: prefix.to_owned(), has_bias: true, single_names: None }
    }
}

fn stack_key(path: &str) -> String {
    format!("L__self___{}", path.replace('.', "_"))
}

/// An archive being edited.
pub(super) struct Document {
    archive: Archive,
}

impl Document {
    pub(super) fn new(archive: Archive) -> Self {
        Self { archive }
    }

    pub(super) fn finish(self) -> Archive {
        self.archive
    }

    pub(super) fn has_parameter_below(&self, module: &str) -> bool {
        self.archive.payloads.keys().any(|name| crate::modules::is_within(name, module))
    }

    pub(super) fn node_count(&mut self) -> Result<usize, Error> {
        Ok(self.list("nodes")?.len())
    }

    pub(super) fn node_index(&mut self, name: &str) -> Result<usize, Error> {
        let position = self.list("nodes")?.iter().position(|node| node["name"] == name);
        position.ok_or_else(|| Error::Document { field: format!("node {name}") })
    }

    pub(super) fn take_node(&mut self, index: usize) -> Result<Value, Error> {
        Ok(self.list("nodes")?.remove(index))
    }

    /// Adds the layers one after another and gives the name of the last one's result, which is `output` where given.
    pub(super) fn add_layers(
        &mut self,
        place: &mut Place,
        input: &str,
        layers: &[Layer],
        dtype: DType,
        output: Option<&str>,
    ) -> Result<String, Error> {
        let is_single = super::is_single(layers);
        let mut current = input.to_owned();
        if let Some(output) = output {
            self.forget_value(output)?;
        }
        for (index, layer) in layers.iter().enumerate() {
            let module = match layer {
                Layer::Linear { .. } if is_single => place.prefix.clone(),
                Layer::Dropout { .. } if is_single => format!("{}.dropout", place.prefix),
                _ => format!("{}.{index}", place.prefix),
            };
            let wanted = output.filter(|_| index + 1 == layers.len());
            current = self.add_layer(place, &module, layer, &current, dtype, wanted)?;
        }
        Ok(current)
    }

    fn add_layer(
        &mut self,
        place: &mut Place,
        module: &str,
        layer: &Layer,
        input: &str,
        dtype: DType,
        output: Option<&str>,
    ) -> Result<String, Error> {
        let (target, class, size) = match layer {
            Layer::Linear { outputs, .. } => ("linear", "torch.nn.modules.linear.Linear", *outputs),
            Layer::BatchNorm { size } => ("batch_norm", "torch.nn.modules.batchnorm.BatchNorm1d", *size),
            Layer::Relu { size } => ("relu", "torch.nn.modules.activation.ReLU", *size),
            Layer::Dropout { size, .. } => ("dropout", "torch.nn.modules.dropout.Dropout", *size),
        };
        let stack = if module == place.prefix {
            place.stack.clone()
        } else {
            format!("{};{},{module},{class}", place.stack, stack_key(module))
        };
        let arguments = match layer {
            Layer::Linear { inputs, outputs } => self.linear(place, module, input, *inputs, *outputs, dtype)?,
            Layer::BatchNorm { size } => self.batch_norm(place, module, &stack, input, *size, dtype)?,
            Layer::Relu { .. } => vec![positional("self", tensor(input))],
            Layer::Dropout { probability, .. } => vec![
                positional("input", tensor(input)),
                positional("p", json!({"as_float": probability})),
                positional("train", json!({"as_bool": true})),
            ],
        };
        let name = match output {
            Some(name) => name.to_owned(),
            None => self.unused_name(&format!("head_{target}"))?,
        };
        self.add_value_like(input, &name, size, dtype)?;
        self.add_node(place, &format!("{target}.default"), &name, arguments, &name, &stack)?;
        Ok(name)
    }

    fn linear(
        &mut self,
        place: &Place,
        module: &str,
        input: &str,
        inputs: i64,
        outputs: i64,
        dtype: DType,
    ) -> Result<Vec<Value>, Error> {
        let names = place.single_names.clone();
        let (weight, bias) = names
            .unwrap_or_else(|| (format!("{module}.weight"), Some(format!("{module}.bias")).filter(|_| place.has_bias)));
        let fan_in = inputs.unsigned_abs();
        let new = |name: String, shape: Vec<i64>, init| NewParameter { name, shape, dtype, init, is_buffer: false };
        let weight = self.add_tensor(new(weight, vec![outputs, inputs], Init::LinearWeight { fan_in }))?;
        let mut arguments = vec![positional("input", tensor(input)), positional("weight", tensor(&weight))];
        if let Some(bias) = bias {
            let bias = self.add_tensor(new(bias, vec![outputs], Init::LinearBias { fan_in }))?;
            arguments.push(positional("bias", tensor(&bias)));
        }
        Ok(arguments)
    }

    /// The counter's node comes before the norm's, as the exporter writes it.
    fn batch_norm(
        &mut self,
        place: &mut Place,
        module: &str,
        stack: &str,
        input: &str,
        size: i64,
        dtype: DType,
    ) -> Result<Vec<Value>, Error> {
        let new = |name: &str, shape: Vec<i64>, init, is_buffer: bool| NewParameter {
            name: format!("{module}.{name}"),
            dtype: if shape.is_empty() { DType::Int64 } else { dtype },
            shape,
            init,
            is_buffer,
        };
        let weight = self.add_tensor(new("weight", vec![size], Init::Ones, false))?;
        let bias = self.add_tensor(new("bias", vec![size], Init::Zeros, false))?;
        let mean = self.add_tensor(new("running_mean", vec![size], Init::Zeros, true))?;
        let variance = self.add_tensor(new("running_var", vec![size], Init::Ones, true))?;
        let count = self.add_tensor(new("num_batches_tracked", Vec::new(), Init::Zeros, true))?;
        let added = self.unused_name("head_add_")?;
        self.set_value(&added, meta(DType::Int64, &[], false))?;
        let arguments = vec![positional("self", tensor(&count)), positional("other", json!({"as_int": 1}))];
        self.add_node(place, "add_.Tensor", &added, arguments, &added, stack)?;
        Ok(vec![
            positional("input", tensor(input)),
            positional("weight", tensor(&weight)),
            positional("bias", tensor(&bias)),
            positional("running_mean", tensor(&mean)),
            positional("running_var", tensor(&variance)),
            positional("training", json!({"as_bool": true})),
            positional("momentum", json!({"as_float": 0.1})),
            positional("eps", json!({"as_float": 1e-5})),
            positional("cudnn_enabled", json!({"as_bool": false})),
        ])
    }

    fn add_node(
        &mut self,
        place: &mut Place,
        target: &str,
        name: &str,
        inputs: Vec<Value>,
        output: &str,
        stack: &str,
    ) -> Result<(), Error> {
        let node = json!({
            "target": format!("torch.ops.aten.{target}"),
            "inputs": inputs,
            "outputs": [tensor(output)],
            "metadata": {"nn_module_stack": stack},
            "is_hop_single_tensor_return": null,
            "name": name,
        });
        self.list("nodes")?.insert(place.index, node);
        place.index += 1;
        Ok(())
    }

    /// Adds a parameter or buffer everywhere it must be named, and gives the name of its graph input.
    fn add_tensor(&mut self, new: NewParameter) -> Result<String, Error> {
        let (letter, kind, field) =
            if new.is_buffer { ("b", "buffer", "buffer_name") } else { ("p", "parameter", "parameter_name") };
        let input = self.unused_name(&format!("{letter}_{}", new.name.replace('.', "_").to_lowercase()))?;
        let requires_grad = !new.is_buffer;
        let meta = meta(new.dtype, &new.shape, requires_grad);
        self.set_value(&input, meta.clone())?;
        let mut spec = json!({kind: {"arg": {"name": input}, field: new.name}});
        if new.is_buffer {
            spec[kind]["persistent"] = json!(true);
        }
        // Graph inputs and signature list parameters first, then buffers, then the rest.
        let specs = self.signature("input_specs")?;
        let is_before =
            |spec: &Value| spec.get("parameter").is_some() || (kind == "buffer" && spec.get("buffer").is_some());
        let index = specs.iter().rposition(is_before).map_or(0, |last| last + 1);
        specs.insert(index, spec);
        self.list("inputs")?.insert(index, tensor(&input));
        let path_name = self.unused_storage();
        let payload =
            Payload::contiguous(format!("{WEIGHTS}{path_name}"), new.dtype, new.shape.clone(), requires_grad)?;
        let config =
            json!({"path_name": path_name, "is_param": requires_grad, "use_pickle": false, "tensor_meta": meta});
        self.weights()?.insert(new.name.clone(), config);
        self.archive.payloads.insert(new.name.clone(), payload);
        self.archive.new_parameters.push(new);
        Ok(input)
    }

    pub(super) fn remove_parameter(&mut self, name: &str) -> Result<(), Error> {
        let missing = || Error::Document { field: format!("parameter {name}") };
        let specs = self.signature("input_specs")?;
        let index = specs.iter().position(|spec| spec["parameter"]["parameter_name"] == name).ok_or_else(missing)?;
        let spec = specs.remove(index);
        let input = spec["parameter"]["arg"]["name"].as_str().ok_or_else(missing)?.to_owned();
        self.list("inputs")?.retain(|argument| argument["as_tensor"]["name"] != input.as_str());
        self.forget_value(&input)?;
        self.weights()?.shift_remove(name);
        self.archive.payloads.remove(name);
        self.archive.new_parameters.retain(|new| new.name != name);
        Ok(())
    }

    pub(super) fn rename_output(&mut self, old: &str, new: &str) -> Result<(), Error> {
        for argument in self.list("outputs")? {
            if argument["as_tensor"]["name"] == old {
                argument["as_tensor"]["name"] = json!(new);
            }
        }
        for spec in self.signature("output_specs")? {
            if spec["user_output"]["arg"]["as_tensor"]["name"] == old {
                spec["user_output"]["arg"]["as_tensor"]["name"] = json!(new);
            }
        }
        Ok(())
    }

    /// Changes the last dimension of a value's metadata.
    pub(super) fn set_last_size(&mut self, name: &str, size: i64) -> Result<(), Error> {
        let meta = self.value(name)?;
        let dtype = meta["dtype"].as_i64().and_then(schema::dtype).unwrap_or(DType::Float32);
        self.add_value_like(name, name, size, dtype)
    }

    /// Metadata for a value shaped like another but in its last dimension, contiguous.
    fn add_value_like(&mut self, like: &str, name: &str, size: i64, dtype: DType) -> Result<(), Error> {
        let mut meta = self.value(like)?;
        let sizes =
            meta["sizes"].as_array_mut().ok_or_else(|| Error::Document { field: format!("sizes of {like}") })?;
        if let Some(last) = sizes.last_mut() {
            *last = json!({"as_int": size});
        }
        let mut strides = Vec::new();
        let mut stride = json!({"as_int": 1});
        for size in sizes.iter().rev() {
            strides.push(stride.clone());
            stride = product(&stride, size);
        }
        strides.reverse();
        meta["strides"] = Value::Array(strides);
        meta["storage_offset"] = json!({"as_int": 0});
        meta["dtype"] = json!(schema::dtype_number(dtype));
        meta["requires_grad"] = json!(true);
        self.set_value(name, meta)
    }

    fn value(&mut self, name: &str) -> Result<Value, Error> {
        self.values()?.get(name).cloned().ok_or_else(|| Error::Document { field: format!("tensor value {name}") })
    }

    fn set_value(&mut self, name: &str, meta: Value) -> Result<(), Error> {
        self.values()?.insert(name.to_owned(), meta);
        Ok(())
    }

    fn forget_value(&mut self, name: &str) -> Result<(), Error> {
        self.values()?.shift_remove(name);
        Ok(())
    }

    fn unused_name(&mut self, wanted: &str) -> Result<String, Error> {
        let mut taken: BTreeSet<String> = self.values()?.keys().cloned().collect();
        taken.extend(self.list("nodes")?.iter().filter_map(|node| node["name"].as_str().map(str::to_owned)));
        let numbered = (1..).map(|number: u64| format!("{wanted}_{number}"));
        let free = std::iter::once(wanted.to_owned()).chain(numbered).find(|name| !taken.contains(name));
        Ok(free.unwrap_or_else(|| wanted.to_owned()))
    }

    fn unused_storage(&self) -> String {
        let number = |entry: &str| entry.strip_prefix(WEIGHTS)?.strip_prefix("weight_")?.parse::<u64>().ok();
        let stored = self.archive.entries.keys().chain(self.archive.payloads.values().map(|payload| &payload.entry));
        format!("weight_{}", stored.filter_map(|entry| number(entry)).max().map_or(0, |last| last.saturating_add(1)))
    }

    fn list(&mut self, field: &str) -> Result<&mut Vec<Value>, Error> {
        let list = self.archive.program["graph_module"]["graph"][field].as_array_mut();
        list.ok_or_else(|| Error::Document { field: format!("graph.{field}") })
    }

    fn signature(&mut self, field: &str) -> Result<&mut Vec<Value>, Error> {
        let list = self.archive.program["graph_module"]["signature"][field].as_array_mut();
        list.ok_or_else(|| Error::Document { field: format!("signature.{field}") })
    }

    fn values(&mut self) -> Result<&mut serde_json::Map<String, Value>, Error> {
        let values = self.archive.program["graph_module"]["graph"]["tensor_values"].as_object_mut();
        values.ok_or_else(|| Error::Document { field: "graph.tensor_values".to_owned() })
    }

    fn weights(&mut self) -> Result<&mut serde_json::Map<String, Value>, Error> {
        self.archive.weights_config["config"]
            .as_object_mut()
            .ok_or_else(|| Error::Document { field: "weights config".to_owned() })
    }
}

fn tensor(name: &str) -> Value {
    json!({"as_tensor": {"name": name}})
}

/// An argument as the schema's `ArgumentKind.POSITIONAL` writes it.
fn positional(name: &str, argument: Value) -> Value {
    json!({"name": name, "arg": argument, "kind": 1})
}

fn meta(dtype: DType, shape: &[i64], requires_grad: bool) -> Value {
    let mut strides = vec![1_i64; shape.len()];
    for dimension in (1..shape.len()).rev() {
        strides[dimension - 1] = strides[dimension].saturating_mul(shape[dimension]);
    }
    let sizes = |numbers: &[i64]| numbers.iter().map(|number| json!({"as_int": number})).collect::<Vec<_>>();
    json!({
        "dtype": schema::dtype_number(dtype),
        "sizes": sizes(shape),
        "requires_grad": requires_grad,
        "device": {"type": "cpu", "index": null},
        "strides": sizes(&strides),
        "storage_offset": {"as_int": 0},
        "layout": schema::STRIDED,
    })
}

/// The product of two sizes, in the schema's form.
fn product(one: &Value, other: &Value) -> Value {
    if let (Some(one), Some(other)) = (one["as_int"].as_i64(), other["as_int"].as_i64()) {
        return json!({"as_int": one.saturating_mul(other)});
    }
    let text = |size: &Value| match size["as_int"].as_i64() {
        Some(known) => format!("Integer({known})"),
        None => size["as_expr"]["expr_str"].as_str().unwrap_or("Integer(1)").to_owned(),
    };
    let hint =
        |size: &Value| size["as_int"].as_i64().or_else(|| size["as_expr"]["hint"]["as_int"].as_i64()).unwrap_or(1);
    let expression = if one["as_int"] == 1 { text(other) } else { format!("Mul({}, {})", text(one), text(other)) };
    json!({"as_expr": {"expr_str": expression, "hint": {"as_int": hint(one).saturating_mul(hint(other))}}})
}
