//! What a node's trainers compute on: the processors, or one GPU each, by slot.

use thaw_torch::cuda;
use thaw_torch::tch::Device;

/// The kind of device of a node's trainers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DeviceKind {
    #[default]
    Cpu,
    /// NVIDIA GPUs, through libtorch's CUDA part.
    Cuda,
}

/// Options of the agent, which passes them on to its trainers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::Args)]
pub struct DeviceOptions {
    /// What trainers compute on: cpu; or cuda, where each slot has a GPU of its own, from --first-gpu on.
    #[arg(long, env = "THAW_DEVICE", value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// GPU of slot 0; for several agents on one machine.
    #[arg(long, default_value_t = 0)]
    first_gpu: u32,
    /// Let trainers share GPUs where there are more slots than GPUs. For tests: NCCL must be 2.30 or newer, and see the same variable.
    #[arg(long, env = "NCCL_MULTI_RANK_GPU_ENABLE", value_parser = clap::builder::BoolishValueParser::new())]
    share_gpus: bool,
}

impl DeviceOptions {
    /// As arguments of a trainer.
    #[must_use]
    pub fn arguments(self) -> Vec<String> {
        let device = match self.device {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda => "cuda",
        };
        let mut arguments = vec!["--device".to_owned(), device.to_owned()];
        arguments.extend(["--first-gpu".to_owned(), self.first_gpu.to_string()]);
        arguments.extend(self.share_gpus.then(|| "--share-gpus".to_owned()));
        arguments
    }

    /// Whether this node has a device for each slot. Makes no context on any.
    ///
    /// # Errors
    /// [`cuda::Error::NotAvailable`] saying what is missing.
    pub fn check(self, slots: u32) -> Result<(), cuda::Error> {
        (0..slots).try_for_each(|slot| self.index(slot).map(drop))
    }

    /// The device of a slot's trainer; called before anything else of libtorch.
    ///
    /// # Errors
    /// As [`DeviceOptions::check`], and where libtorch has no CUDA part.
    pub(crate) fn of_slot(self, slot: u32) -> Result<Device, cuda::Error> {
        self.index(slot)?.map_or(Ok(Device::Cpu), cuda::select)
    }

    /// The GPU of a slot; `None` on the CPU.
    fn index(self, slot: u32) -> Result<Option<usize>, cuda::Error> {
        match self.device {
            DeviceKind::Cpu => Ok(None),
            DeviceKind::Cuda => gpu_of(self.first_gpu + slot, cuda::devices()?, self.share_gpus).map(Some),
        }
    }
}

fn gpu_of(wanted: u32, gpus: usize, share: bool) -> Result<usize, cuda::Error> {
    let wanted = wanted as usize;
    if wanted < gpus || share {
        return Ok(wanted % gpus);
    }
    let what =
        format!("a slot is to have GPU {wanted}, but this machine shows {gpus}, from 0; lower --slots or --workers");
    Err(cuda::Error::NotAvailable { what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_a_gpu_of_its_own_unless_they_share() {
        assert_eq!((0..4).map(|wanted| gpu_of(wanted, 2, true).unwrap()).collect::<Vec<_>>(), [0, 1, 0, 1]);
        assert_eq!(gpu_of(1, 2, false).unwrap(), 1);
        let error = gpu_of(2, 2, false).unwrap_err();
        assert!(error.to_string().contains("a slot is to have GPU 2, but this machine shows 2"), "{error}");
    }

    #[test]
    fn without_a_gpu_cuda_is_refused_by_name() {
        assert_eq!(DeviceOptions::default().of_slot(3).unwrap(), Device::Cpu);
        let options = DeviceOptions { device: DeviceKind::Cuda, first_gpu: 2, share_gpus: true };
        assert_eq!(options.arguments(), ["--device", "cuda", "--first-gpu", "2", "--share-gpus"]);
        match cuda::devices() {
            Ok(_) => options.check(1).unwrap(),
            Err(missing) => assert_eq!(options.check(1).unwrap_err().to_string(), missing.to_string()),
        }
    }
}
