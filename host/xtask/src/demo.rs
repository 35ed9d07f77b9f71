//! `cargo xtask demo`: from a clean clone to a trained agent.

use std::time::Instant;

use clap::Args;

use crate::example::{Example, ExampleName};
use crate::process;

/// Options of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArguments {
    /// Seed of the run.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What is trained.
    #[arg(long, value_enum, default_value_t = ExampleName::Rooms)]
    example: ExampleName,
}

/// Builds guests, host and data, and trains the example.
pub(crate) fn run(arguments: &DemoArguments) -> anyhow::Result<()> {
    let start = Instant::now();
    let example = Example::build(arguments.example)?;
    println!("==> training (everything was built in {} s)", start.elapsed().as_secs());
    let run = example.fresh_run(&format!("{}-seed{}", run_name(arguments.example), arguments.seed));
    process::run(&mut example.train(&example.config(), arguments.seed, &run))?;
    println!("demo finished after {} s", start.elapsed().as_secs());
    Ok(())
}

/// The start of the run's folder's name.
fn run_name(example: ExampleName) -> &'static str {
    match example {
        ExampleName::Rooms => "demo",
        ExampleName::Calc => "demo-calc",
    }
}
