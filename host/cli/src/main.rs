//! The `fulgurite` binary. Standard output is data, standard error is everything else.

mod arguments;
mod bench;
mod build;
mod cancel;
mod doctor;
mod explain;
mod failure;
mod fork;
mod paths;
mod plugin;
mod policy;
mod progress;
mod replay;
mod rollouts;
mod store;
mod table;
mod terminal;
mod train;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::{Arguments, Command, PluginCommand, RolloutsCommand};
use crate::failure::Failure;

// Small models allocate and free activation memory all the time; the system allocator hands it back to the kernel and pays
// a page fault for each page of it in the next step. Without huge pages: with them a seventh of the time of recorded rollouts
// went into clearing memory that nobody then used, and training was not faster.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    terminal::start_log(arguments.verbose);
    match execute(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn execute(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::Train(arguments) => runtime()?.block_on(train::train(arguments)),
        Command::Run(arguments) => runtime()?.block_on(train::run(arguments)),
        Command::Build(arguments) => build::build(&arguments),
        Command::Plugin { command: PluginCommand::New(arguments) } => plugin::new(&arguments),
        Command::Plugin { command: PluginCommand::Check(arguments) } => plugin::check(&arguments),
        Command::Rollouts { command: RolloutsCommand::List(arguments) } => rollouts::list(&arguments),
        Command::Rollouts { command: RolloutsCommand::Show(arguments) } => rollouts::show(&arguments),
        Command::Rollouts { command: RolloutsCommand::Cancel(arguments) } => cancel::cancel(&arguments),
        Command::Explain(arguments) => explain::run(&arguments),
        Command::Replay(arguments) => runtime()?.block_on(replay::replay(arguments)),
        Command::Fork(arguments) => runtime()?.block_on(fork::fork(arguments)),
        Command::Bench { command } => bench::bench(command),
        Command::Store { command } => store::execute(&command),
        Command::Policy { command } => policy::execute(&command),
        Command::Doctor(arguments) => runtime()?.block_on(doctor::doctor(&arguments)),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| Failure::failed(anyhow::Error::new(error).context("cannot start the async runtime")))
}
