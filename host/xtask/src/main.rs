//! The project's own tooling: `cargo xtask guests | demo | test | learn | soak | check-gpu`.

mod checks;
mod demo;
mod example;
mod gpu;
mod guests;
mod learn;
mod process;
mod soak;
mod templates;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, trains and checks Fulgurite.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
enum Command {
    /// Build all plugins as components into target/plugins (about 30 s from cold, 1 s when nothing has changed).
    Guests,
    /// Train the example on CPU and show what it learned (with 2 cores: up to 30 min from cold, of which 8 train).
    Demo(demo::DemoArguments),
    /// Everything that CI runs: format, lints, guests, tests, templates, docs, licences (with 2 cores: up to 40 min from
    /// cold, about 8 min when dependencies are built).
    Test(checks::TestArguments),
    /// Make the learning tables: all seeds and all controls (with 2 cores: about 60 min).
    Learn(learn::LearnArguments),
    /// Fuzz every target for 10 minutes; kill training at random moments, many times, and compare what comes out (with 2
    /// cores: about 50 min).
    Soak(soak::SoakArguments),
    /// Compile the GPU backends, which needs no GPU (with 2 cores: about 15 min for each, the first time).
    CheckGpu(gpu::CheckGpuArguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Command::Guests => guests::build().map(|()| true),
        Command::Demo(arguments) => demo::run(&arguments).map(|()| true),
        Command::Test(arguments) => checks::run(&arguments),
        Command::Learn(arguments) => learn::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
        Command::CheckGpu(arguments) => gpu::check(&arguments).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
