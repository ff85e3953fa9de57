//! A group's weights as named bytes, for checkpoints and exports.

use std::collections::BTreeMap;

use bytes::Bytes;
use tch::{Device, Tensor};
use thaw_graph::ir::DType;

use super::{Error, SegmentedModel, load, tensor_error};
use crate::autograd::GradMode;
use crate::executor::dtype_of;
use crate::runtime;

/// A named tensor as raw little-endian bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<i64>,
    pub bytes: Bytes,
}

impl StateTensor {
    /// Copies a tensor's elements.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn of(name: &str, tensor: &Tensor) -> Result<Self, Error> {
        let copy = || {
            let mut copy = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
            copy.f_copy_(&tensor.f_detach()?)?;
            Ok(copy)
        };
        Self::sharing(name, &copy().map_err(tensor_error("a tensor's bytes"))?)
    }

    /// The elements of a tensor that nobody writes to while the bytes live: its own memory where it has them there, row-major.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn sharing(name: &str, tensor: &Tensor) -> Result<Self, Error> {
        let row_major = tensor
            .f_detach()
            .and_then(|tensor| tensor.f_to_device(Device::Cpu))
            .and_then(|tensor| tensor.f_contiguous())
            .map_err(tensor_error("a tensor's bytes"))?;
        let dtype = dtype_of(row_major.kind()).expect("weights have one of the graph's element types");
        Ok(Self { name: name.to_owned(), dtype, shape: row_major.size(), bytes: runtime::into_bytes(row_major) })
    }

    /// The tensor, on the CPU.
    ///
    /// # Errors
    /// [`Error::WeightShape`] where bytes and shape differ.
    pub fn to_tensor(&self) -> Result<Tensor, Error> {
        load::tensor_from_bytes(&self.name, self.dtype, &self.shape, &self.bytes)
    }
}

impl SegmentedModel {
    /// A group's parameters and buffers in the master type, parameters first, in their order in the flat buffer.
    ///
    /// # Errors
    /// [`Error::NoSuchGroup`].
    pub fn state(&self, group: usize) -> Result<Vec<StateTensor>, Error> {
        self.handles(group)?.into_iter().map(|(name, tensor)| StateTensor::of(&name, &tensor)).collect()
    }

    /// Puts back what [`SegmentedModel::state`] returned: every tensor of the group, no other.
    ///
    /// # Errors
    /// [`Error::StateMissing`], [`Error::StateUnknown`], [`Error::WeightShape`]; nothing has changed then.
    pub fn load_state(&mut self, group: usize, state: &[StateTensor]) -> Result<(), Error> {
        let handles = self.handles(group)?;
        let group = self.groups[group].name.clone();
        let mut given: BTreeMap<&str, &StateTensor> =
            state.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut copies = Vec::new();
        for (name, target) in handles {
            let Some(source) = given.remove(name.as_str()) else { return Err(Error::StateMissing { group, name }) };
            if source.shape != target.size() || Some(source.dtype) != dtype_of(target.kind()) {
                return Err(Error::WeightShape {
                    name,
                    expected: format!("{:?} {:?}", target.kind(), target.size()),
                    found: format!("{:?} {:?}", source.dtype, source.shape),
                });
            }
            copies.push((target, source.to_tensor()?));
        }
        if let Some(name) = given.keys().next() {
            return Err(Error::StateUnknown { group, name: (*name).to_owned() });
        }
        let _mode = GradMode::set(false);
        for (mut target, source) in copies {
            target.f_copy_(&source).map_err(tensor_error("a restored weight"))?;
        }
        Ok(())
    }

    /// Name and tensor of all that a group owns; the tensors share memory with the model's.
    fn handles(&self, group: usize) -> Result<Vec<(String, Tensor)>, Error> {
        let Some(owner) = self.groups.get(group) else {
            return Err(Error::NoSuchGroup { index: group, groups: self.groups.len() });
        };
        let mut handles = Vec::new();
        for parameter in &owner.parameters {
            handles.push((parameter.name.clone(), parameter.view(&owner.flat)?));
        }
        handles.extend(owner.buffers.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
        Ok(handles)
    }
}
