//! Which device runs the model, and what this build and this machine offer.
//!
//! The default build has the CPU alone. Features `cuda` and `wgpu` of this crate compile burn's backends of those names;
//! whether one can be used is found out when the engine starts, because a build for a GPU server also runs on a laptop.

use burn::prelude::Device;
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use crate::config::invalid;
use crate::error::PolicyError;
use crate::model::DeviceModels;

/// What runs the model: training and generation alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PolicyDevice {
    /// The first of `cuda`, `wgpu` and `cpu` that this build has and this machine offers. A GPU that is only emulated on
    /// the CPU does not count.
    Auto,
    /// Kernels of this crate: the same that sample, so that log-probs of sampling and training are equal bit by bit.
    #[default]
    Cpu,
    /// burn's CPU backend with its autodiff: slower, and the operations that burn's GPU backends run. To test those.
    Flex,
    /// An NVIDIA GPU, by its number from 0.
    Cuda(u16),
    /// A GPU through Vulkan, Metal or DirectX, by its number from 0.
    Wgpu(u16),
}

/// In which numbers a device holds its copy of the weights, multiplies, and keeps keys and values.
///
/// Master weights, gradients' sums and the optimiser are f32 on the host in any case; so are, on the device, the residual
/// stream, norms, softmax and log-softmax.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DevicePrecision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the range of f32 and 8 bits of precision: half the memory, and what a GPU multiplies fastest.
    Bf16,
}

impl DevicePrecision {
    /// Bytes of one number.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// Most GPUs that a number may name: more than any machine has.
const DEVICE_NUMBER_MAX: u16 = 255;

impl std::str::FromStr for PolicyDevice {
    type Err = PolicyError;
    fn from_str(name: &str) -> Result<Self, PolicyError> {
        let unknown = || PolicyError::UnknownDevice(name.to_owned());
        let (kind, number) = name.split_once(':').map_or((name, None), |(kind, number)| (kind, Some(number)));
        let index = match number {
            None => 0,
            Some(number) => number.parse().ok().filter(|index| *index <= DEVICE_NUMBER_MAX).ok_or_else(unknown)?,
        };
        match (kind, number) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("flex", None) => Ok(Self::Flex),
            ("cuda", _) => Ok(Self::Cuda(index)),
            ("wgpu", _) => Ok(Self::Wgpu(index)),
            _ => Err(unknown()),
        }
    }
}

impl std::fmt::Display for PolicyDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Flex => f.write_str("flex"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Wgpu(index) => write!(f, "wgpu:{index}"),
        }
    }
}

impl TryFrom<String> for PolicyDevice {
    type Error = PolicyError;
    fn try_from(name: String) -> Result<Self, PolicyError> {
        name.parse()
    }
}

impl From<PolicyDevice> for String {
    fn from(device: PolicyDevice) -> Self {
        device.to_string()
    }
}

/// One device and what was found of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceFinding {
    /// Its name in a config.
    pub device: PolicyDevice,
    /// Whether a policy can be trained on it and answer on it.
    pub usable: bool,
    /// What was found, or why it cannot be used and what to do.
    pub found: String,
}

/// What computes.
#[derive(Debug, Clone)]
pub(crate) enum Backend {
    /// The kernels of this crate.
    Kernels,
    /// burn, on one of its devices.
    Burn(Device),
}

impl Backend {
    /// Whether all workers would share one device, which runs one thing at a time: then there is one worker.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self, Self::Burn(device) if !is_host(device))
    }

    /// What is on its device, in some numbers; nothing on the kernels.
    pub(crate) fn models(&self, precision: DevicePrecision) -> Option<DeviceModels> {
        match self {
            Self::Kernels => None,
            Self::Burn(device) => Some(DeviceModels::new(device.clone(), precision)),
        }
    }

    /// Checks that it has the numbers that a config asks for.
    ///
    /// # Errors
    /// [`PolicyError::InvalidConfig`] when it has not.
    pub(crate) fn check_precision(&self, asked: PolicyDevice, precision: DevicePrecision) -> Result<(), PolicyError> {
        if precision == DevicePrecision::F32 {
            return Ok(());
        }
        let reason = match self {
            Self::Kernels => format!("device `{asked}` computes in f32 here: leave the field out, or use a GPU"),
            Self::Burn(device) if !device.supports_dtype(precision.dtype()) => {
                format!("device `{asked}` cannot multiply such numbers: leave the field out, or use `cuda`")
            }
            Self::Burn(_) => return Ok(()),
        };
        Err(invalid("device_precision", "bf16", &reason))
    }
}

/// Whether a device of burn's is the CPU.
pub(crate) fn is_host(device: &Device) -> bool {
    *device == Device::flex()
}

impl PolicyDevice {
    /// The device to use, checked to be there.
    ///
    /// # Errors
    /// [`PolicyError::UnusableDevice`] when this build or this machine does not have it.
    pub(crate) fn open(self) -> Result<Backend, PolicyError> {
        let unusable = |reason| PolicyError::UnusableDevice { device: self, reason };
        match self {
            Self::Cpu => Ok(Backend::Kernels),
            Self::Flex => Ok(Backend::Burn(Device::flex())),
            Self::Cuda(index) => CUDA.open(index).map(Backend::Burn).map_err(unusable),
            Self::Wgpu(index) => WGPU.open(index).map(Backend::Burn).map_err(unusable),
            Self::Auto => {
                let gpu = CUDA.first_real().or_else(|| WGPU.first_real());
                Ok(gpu.map_or(Backend::Kernels, Backend::Burn))
            }
        }
    }

    /// The CPU in its two ways, and what GPUs this build and this machine have: what the numeric tests run on.
    #[cfg(test)]
    pub(crate) fn tested() -> Vec<Self> {
        let gpus = Self::findings().into_iter().filter(|finding| finding.usable && finding.device != Self::Cpu);
        [Self::Cpu, Self::Flex].into_iter().chain(gpus.map(|finding| finding.device)).collect()
    }

    /// All devices that a config can name, the best one first, with what was found of each.
    #[must_use]
    pub fn findings() -> Vec<DeviceFinding> {
        let gpu = |device, kind: GpuKind| {
            let all = kind.all();
            let usable = all.is_ok();
            DeviceFinding { device, usable, found: all.map_or_else(|why| why, |all| found(&all)) }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        vec![
            gpu(Self::Cuda(0), CUDA),
            gpu(Self::Wgpu(0), WGPU),
            DeviceFinding { device: Self::Cpu, usable: true, found: format!("{cores} cores") },
        ]
    }
}

type FindDevices = fn() -> Result<Vec<Device>, String>;

/// GPUs of one kind.
struct GpuKind {
    /// The feature of this crate that has them.
    feature: &'static str,
    /// What to say where there are none.
    missing: &'static str,
    /// Asks burn for them; `None` in a build without the feature.
    all: Option<FindDevices>,
}

const CUDA: GpuKind = GpuKind {
    feature: "cuda",
    missing: "no NVIDIA GPU was found: install its driver, and CUDA's runtime compiler (libnvrtc)",
    #[cfg(feature = "cuda")]
    all: Some(|| probe(burn::tensor::DeviceType::Cuda)),
    #[cfg(not(feature = "cuda"))]
    all: None,
};

const WGPU: GpuKind = GpuKind {
    feature: "wgpu",
    missing: "no GPU was found: install a Vulkan driver",
    #[cfg(feature = "wgpu")]
    all: Some(|| probe(burn::tensor::DeviceType::Wgpu)),
    #[cfg(not(feature = "wgpu"))]
    all: None,
};

impl GpuKind {
    /// All of them, at least one; or why there is none.
    fn all(&self) -> Result<Vec<Device>, String> {
        let absent = || format!("this build is without it: build with `--features {}`", self.feature);
        let found = self.all.ok_or_else(absent)?()?;
        if found.is_empty() { Err(self.missing.to_owned()) } else { Ok(found) }
    }

    /// The first one that is not emulated.
    fn first_real(&self) -> Option<Device> {
        self.all().ok()?.into_iter().find(|device| !is_emulated(device))
    }

    fn open(&self, index: u16) -> Result<Device, String> {
        let found = self.all()?;
        let count = found.len();
        found.into_iter().nth(usize::from(index)).ok_or_else(|| format!("there are {count}, numbered from 0"))
    }
}

/// What is said of devices of one kind, of which there is at least one.
fn found(all: &[Device]) -> String {
    match all.iter().filter(|device| is_emulated(device)).count() {
        0 => format!("{} found", all.len()),
        emulated if emulated == all.len() => "emulated on the CPU; `auto` does not take it".to_owned(),
        emulated => format!("{} found, {emulated} of them emulated on the CPU", all.len()),
    }
}

/// Whether a GPU is one that the CPU plays, such as Mesa's lavapipe: right, and slower than device `cpu`.
#[cfg(feature = "wgpu")]
fn is_emulated(device: &Device) -> bool {
    *device == Device::wgpu(burn::tensor::DeviceKind::Cpu)
}

/// Without wgpu there are none.
#[cfg(not(feature = "wgpu"))]
fn is_emulated(_: &Device) -> bool {
    false
}

/// Asks burn which devices of a kind there are. Drivers that are missing or broken make some of its backends panic; that is
/// an answer too.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn probe(kind: burn::tensor::DeviceType) -> Result<Vec<Device>, String> {
    let found = std::panic::catch_unwind(|| Device::enumerate(kind)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        format!("its driver failed: {}", text.unwrap_or("no message"))
    })?;
    Ok(found.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written_and_others_refused() {
        for (name, device) in [
            ("auto", PolicyDevice::Auto),
            ("cpu", PolicyDevice::Cpu),
            ("flex", PolicyDevice::Flex),
            ("cuda:0", PolicyDevice::Cuda(0)),
            ("cuda:7", PolicyDevice::Cuda(7)),
            ("wgpu:1", PolicyDevice::Wgpu(1)),
        ] {
            assert_eq!(name.parse::<PolicyDevice>().unwrap(), device);
            assert_eq!(device.to_string(), name);
        }
        assert_eq!("cuda".parse::<PolicyDevice>().unwrap(), PolicyDevice::Cuda(0));
        for name in ["gpu", "cuda:", "cuda:-1", "cuda:256", "cpu:0", "auto:0", ""] {
            let error = name.parse::<PolicyDevice>().unwrap_err().to_string();
            assert!(error.contains("auto, cpu, cuda, cuda:N, wgpu, wgpu:N or flex"), "{error}");
        }
    }

    #[test]
    fn what_is_not_there_is_refused_with_the_reason_and_auto_finds_something() {
        let auto = PolicyDevice::Auto.open().unwrap();
        assert!(matches!(&auto, Backend::Kernels) || matches!(&auto, Backend::Burn(device) if !is_emulated(device)));
        for finding in PolicyDevice::findings() {
            match finding.device.open() {
                Ok(_) => assert!(finding.usable),
                Err(error) => {
                    assert!(!finding.usable);
                    let text = error.to_string();
                    assert!(text.contains(&finding.device.to_string()) && text.contains(&finding.found), "{text}");
                }
            }
        }
    }
}
