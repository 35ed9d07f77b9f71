//! The plot of reward per update.

use std::path::Path;

use plotters::prelude::*;

use crate::metrics::MetricRow;

/// Metric that is drawn.
pub(crate) const REWARD_METRIC: &str = "reward_mean";

/// Updates that the running mean looks back over.
const WINDOW: usize = 10;

/// Why a plot could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw `{path}`: {problem}")]
pub struct PlotError {
    path: String,
    problem: String,
}

/// Draws reward per update of every stage that reports [`REWARD_METRIC`], one after the other, with a running mean. Writes
/// nothing when no stage does.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn draw(path: &Path, title: &str, rows: &[MetricRow]) -> Result<(), PlotError> {
    let points: Vec<(&str, f64)> = rows
        .iter()
        .filter_map(|row| row.scalars.get(REWARD_METRIC).map(|reward| (row.stage.as_str(), *reward)))
        .collect();
    if points.is_empty() {
        return Ok(());
    }
    render(path, title, &points)
        .map_err(|error| PlotError { path: path.display().to_string(), problem: error.to_string() })
}

fn render(path: &Path, title: &str, points: &[(&str, f64)]) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, (900, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let low = points.iter().map(|(_, reward)| *reward).fold(0.0, f64::min);
    let high = points.iter().map(|(_, reward)| *reward).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0..points.len(), low..high)?;
    chart.configure_mesh().x_desc("update").y_desc("mean reward of the batch").draw()?;
    let mut stages: Vec<&str> = points.iter().map(|(stage, _)| *stage).collect();
    stages.dedup();
    for (index, stage) in stages.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let own: Vec<(usize, f64)> =
            points.iter().enumerate().filter(|(_, (name, _))| name == stage).map(|(x, (_, y))| (x, *y)).collect();
        let mean: Vec<(usize, f64)> = (0..own.len())
            .filter_map(|end| {
                let window = own.get(end.saturating_sub(WINDOW - 1)..=end)?;
                let (x, _) = window.last()?;
                Some((*x, window.iter().map(|(_, y)| y).sum::<f64>() / window.len() as f64))
            })
            .collect();
        chart.draw_series(LineSeries::new(own, colour.mix(0.35)))?;
        chart
            .draw_series(LineSeries::new(mean, colour.stroke_width(2)))?
            .label(format!("{stage} (mean of {WINDOW})"))
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn draws_every_stage_with_rewards_and_nothing_without() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reward.svg");
        let row = |stage: &str, name: &str, value: f64| MetricRow {
            stage: stage.to_owned(),
            scalars: BTreeMap::from([(name.to_owned(), value)]),
            ..MetricRow::default()
        };
        draw(&path, "rooms", &[row("sft", "loss", 1.0)]).unwrap();
        assert!(!path.exists());
        draw(
            &path,
            "rooms",
            &[row("sft", "loss", 1.0), row("grpo", REWARD_METRIC, 0.2), row("grpo", REWARD_METRIC, 0.9)],
        )
        .unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.contains("rooms") && svg.contains("grpo (mean of 10)") && !svg.contains("sft"));
    }
}
