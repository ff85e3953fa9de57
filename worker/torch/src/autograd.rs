//! Gradients by libtorch's engine, and the switch that records for it.

use tch::Tensor;
use torch_sys::C_tensor;

use crate::ffi;

/// Why gradients could not be computed.
#[derive(Debug, thiserror::Error)]
#[error("cannot compute gradients: {message}")]
pub struct Error {
    message: String,
}

/// Whether operators record for autograd, until dropped; then as before. Not `Send`: the switch belongs to the thread.
#[derive(Debug)]
pub struct GradMode {
    before: bool,
    _thread: std::marker::PhantomData<*const ()>,
}

impl GradMode {
    /// Sets the switch for this thread.
    #[must_use]
    pub fn set(enabled: bool) -> Self {
        // SAFETY: sets a thread-local flag.
        let before = unsafe { ffi::thaw_set_grad_mode(i32::from(enabled)) } != 0;
        Self { before, _thread: std::marker::PhantomData }
    }
}

impl Drop for GradMode {
    fn drop(&mut self) {
        // SAFETY: sets a thread-local flag.
        unsafe { ffi::thaw_set_grad_mode(i32::from(self.before)) };
    }
}

/// Puts Thaw's kernels (dropout, linear, embedding, softmax of attention) in the place of libtorch's own: fewer passes over memory, the same
/// bits. For the process; `false` where libtorch refuses them.
#[must_use]
pub fn register_kernels() -> bool {
    // SAFETY: registers functions that live as long as the process.
    unsafe { ffi::thaw_register_kernels() == 0 }
}

/// Where `parameter`'s gradient is to be written by the operator that reads it, if that is a linear layer or an embedding; `None`: anywhere.
/// [`grad`] then returns `home` itself. Only for a leaf that one operator reads, and once a step: a second gradient would overwrite the
/// first.
pub(crate) fn set_gradient_home(parameter: &Tensor, home: Option<&Tensor>) {
    let home = home.map_or(std::ptr::null(), Tensor::as_ptr);
    // SAFETY: both tensors are alive; the parameter takes its own reference to the home.
    unsafe { ffi::thaw_set_gradient_home(parameter.as_ptr(), home) }
}

/// Keeps the copy in bf16 that mixed precision makes of a weight until the weight changes. Only for a leaf.
pub(crate) fn keep_half_copy(weight: &Tensor) {
    // SAFETY: the tensor is alive; it is referred to weakly.
    unsafe { ffi::thaw_keep_half_copy(weight.as_ptr()) }
}

/// The gradients of the sum of `outputs`, each weighted by its gradient (`None`: one, for a scalar), by `inputs`; `None` where an input
/// was not used. The graph behind `outputs` is freed.
///
/// An input may be an output as well: its gradient then starts from the one given, in the order in which one backward pass over the whole
/// graph would have added it.
///
/// # Errors
/// With libtorch's text, e.g. where an output does not require a gradient.
pub fn grad(outputs: &[(&Tensor, Option<&Tensor>)], inputs: &[&Tensor]) -> Result<Vec<Option<Tensor>>, Error> {
    let roots: Vec<*const C_tensor> = outputs.iter().map(|(output, _)| output.as_ptr()).collect();
    let weights: Vec<*const C_tensor> =
        outputs.iter().map(|(_, weight)| weight.map_or(std::ptr::null(), Tensor::as_ptr)).collect();
    let leaves: Vec<*const C_tensor> = inputs.iter().map(|input| input.as_ptr()).collect();
    let mut results: Vec<*mut C_tensor> = vec![std::ptr::null_mut(); inputs.len()];
    let count = |length: usize| i32::try_from(length).expect("fewer than 2^31 tensors");
    // SAFETY: the arrays have the lengths given, their tensors outlive the call, and `results` has one entry per input.
    let code = unsafe {
        ffi::thaw_grad(
            roots.as_ptr(),
            weights.as_ptr(),
            count(roots.len()),
            leaves.as_ptr(),
            count(leaves.len()),
            results.as_mut_ptr(),
        )
    };
    if code != 0 {
        return Err(Error { message: ffi::last_error() });
    }
    // SAFETY: each pointer that is not null is a new tensor handed over by the call.
    Ok(results.into_iter().map(|pointer| (!pointer.is_null()).then(|| unsafe { Tensor::from_ptr(pointer) })).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_that_is_an_output_starts_from_the_gradient_given() {
        let _mode = GradMode::set(true);
        let x = Tensor::from_slice(&[1.0_f32, 2.0]).set_requires_grad(true);
        let unused = Tensor::from_slice(&[1.0_f32]).set_requires_grad(true);
        let y = &x * &x;
        let ones = Tensor::from_slice(&[1.0_f32, 1.0]);
        let tens = Tensor::from_slice(&[10.0_f32, 10.0]);
        let gradients = grad(&[(&y, Some(&ones)), (&x, Some(&tens))], &[&x, &unused]).unwrap();
        let by_x = gradients[0].as_ref().unwrap();
        assert_eq!(Vec::<f32>::try_from(by_x).unwrap(), [12.0, 14.0]);
        assert!(gradients[1].is_none());
    }

    #[test]
    fn the_switch_goes_back() {
        let outer = GradMode::set(true);
        {
            let _inner = GradMode::set(false);
            let x = Tensor::from_slice(&[1.0_f32]).set_requires_grad(true);
            assert!(!(&x * 2.0).requires_grad());
        }
        let x = Tensor::from_slice(&[1.0_f32]).set_requires_grad(true);
        assert!((&x * 2.0).requires_grad());
        drop(outer);
    }
}
