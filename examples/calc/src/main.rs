//! Writes the example's data: `cargo run --release -p calc-data -- --seed 0 --out DIR`.

use clap::Parser;
use example_data::{Arguments, write};
use fulgurite_core::seed::Seed;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let data = calc_data::generate(Seed::new(arguments.seed));
    let folder = arguments.folder()?;
    write(folder, "train", &data.train)?;
    write(folder, "val", &data.val)?;
    write(folder, "test", &data.test)?;
    write(folder, "demonstrations", &data.demonstrations)
}
