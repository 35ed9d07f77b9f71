//! `cargo xtask check-gpu`: whether the GPU backends compile. No GPU is needed for that.

use std::path::Path;

use anyhow::{Context, bail};

use crate::process::{Workspace, run};

/// Where the stand-in for `cubecl-llvm` is, from the workspace's root.
const STAND_IN: &str = "host/xtask/cubecl-llvm";

/// A GPU backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum GpuBackend {
    /// NVIDIA.
    Cuda,
    /// Vulkan, Metal, DirectX.
    Wgpu,
}

/// What to compile.
#[derive(Debug, clap::Args)]
pub(crate) struct CheckGpuArguments {
    /// Only this backend.
    #[arg(long, value_enum)]
    backend: Option<GpuBackend>,
    /// Build CUDA without the LLVM that its build script downloads: kernels are then compiled by NVRTC when the program
    /// runs. For networks that reach the crate registry alone.
    #[arg(long)]
    closed_network: bool,
    /// Build the program, with machine code, instead of only checking that it compiles. It lies in target/gpu/release.
    #[arg(long)]
    build: bool,
}

/// Puts the lock file back when it is dropped: the stand-in is another source of a package, which cargo notes there.
struct LockFile<'a> {
    path: &'a Path,
    content: Vec<u8>,
}

impl Drop for LockFile<'_> {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(self.path, &self.content) {
            eprintln!("cannot put {} back: {error}; `git checkout` it", self.path.display());
        }
    }
}

pub(crate) fn check(arguments: &CheckGpuArguments) -> anyhow::Result<()> {
    let workspace = Workspace::load()?;
    let path = workspace.root.join("Cargo.lock");
    let content = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let _lock = LockFile { path: &path, content };
    let backends = match arguments.backend {
        Some(backend) => vec![backend],
        None => vec![GpuBackend::Cuda, GpuBackend::Wgpu],
    };
    for backend in backends {
        let feature = match (backend, arguments.closed_network) {
            (GpuBackend::Cuda, true) => "cuda-nvrtc",
            (GpuBackend::Cuda, false) => "cuda",
            (GpuBackend::Wgpu, _) => "wgpu",
        };
        let mut cargo = workspace.cargo();
        cargo.args([if arguments.build { "build" } else { "check" }, "--release", "--package", "fulgurite-cli"]);
        // A folder of its own: other features of shared packages would make the usual builds start anew.
        cargo.args(["--features", feature, "--target-dir"]).arg(workspace.target.join("gpu"));
        if backend == GpuBackend::Cuda && arguments.closed_network {
            let stand_in = workspace.root.join(STAND_IN);
            let Some(stand_in) = stand_in.to_str() else { bail!("the path of the workspace is not UTF-8") };
            cargo.args(["--config", &format!("patch.crates-io.cubecl-llvm.path={stand_in:?}")]);
            if std::env::var_os("CUDARC_CUDA_VERSION").is_none() {
                // Without nvcc cudarc takes the newest version that it knows; drivers of older ones lack its functions.
                cargo.env("CUDARC_CUDA_VERSION", "12080");
            }
        }
        eprintln!("==> {feature}");
        run(&mut cargo)?;
    }
    Ok(())
}
