//! Writes the example's data: `cargo run --release -p calc-data -- --seed 0 --out DIR`.

fn main() -> anyhow::Result<()> {
    example_data::run(calc_data::generate)
}
