//! Writes the example's data: `cargo run --release -p rooms-data -- --seed 0 --out DIR`.

fn main() -> anyhow::Result<()> {
    example_data::run(rooms_data::generate)
}
