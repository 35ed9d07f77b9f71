//! Learning curves as a picture: SVG without a background, in colours that can be read on a light page and on a dark one.

/// Size of the picture and where the axes lie in it, in pixels.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 740.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 366.0;

/// Updates that the running mean looks back over.
const WINDOW: usize = 10;
/// Places along the axis at which the mean of several runs is taken.
const PLACES: usize = 200;
/// Ticks of the axis of tokens at most.
const TICKS_MAX: f64 = 8.0;
/// Text and axes: at least 3.9 to 1 on white and on GitHub's dark grey.
const GREY: &str = "#768390";
/// Colours, and dashes for those who cannot tell them apart, of at least 3 to 1 on both.
const STYLES: [(&str, &str); 4] =
    [("#3b82f6", "none"), ("#d97706", "9 3"), ("#16a34a", "3 3"), ("#a855f7", "12 3 3 3")];

/// What one run earned, update by update: tokens that were drawn by then, and the mean reward of the batch.
pub(super) type Run = Vec<(f64, f64)>;

/// What is drawn in one colour.
#[derive(Debug)]
pub(super) struct Curve {
    pub(super) name: &'static str,
    pub(super) runs: Vec<Run>,
}

/// Draws rewards of 0 to 1 by tokens: each run thin, and the mean of a curve's runs over it.
pub(super) fn svg(curves: &[Curve], tokens_max: f64) -> String {
    let mut picture = String::new();
    axes(&mut picture, tokens_max);
    for (number, (curve, (colour, dashes))) in curves.iter().zip(STYLES.iter().cycle()).enumerate() {
        let smooth: Vec<Run> = curve.runs.iter().map(|run| running_mean(run)).collect();
        let line = |points: &[(f64, f64)], style: &str| {
            let place = |(tokens, reward): &(f64, f64)| format!("{:.1},{:.1}", x(*tokens, tokens_max), y(*reward));
            let points: Vec<String> = points.iter().filter(|(tokens, _)| *tokens <= tokens_max).map(place).collect();
            format!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" {style}/>\n", points.join(" "))
        };
        if smooth.len() > 1 {
            picture.extend(smooth.iter().map(|run| line(run, "stroke-width=\"1\" stroke-opacity=\"0.35\"")));
        }
        let thick = format!("stroke-width=\"2.5\" stroke-dasharray=\"{dashes}\"");
        picture.push_str(&line(&mean_of(&smooth, tokens_max), &thick));
        let (left, middle) = (RIGHT - 120.0, BOTTOM - 84.0 + 20.0 * number as f64);
        picture.push_str(&stroke(left, middle, left + 32.0, middle, colour, &thick));
        picture.push_str(&text(left + 40.0, middle + 4.0, "start", curve.name));
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\" role=\"img\">\n<title>Reward by sampled tokens</title>\n{picture}</svg>\n"
    )
}

fn x(tokens: f64, tokens_max: f64) -> f64 {
    LEFT + (RIGHT - LEFT) * tokens / tokens_max.max(1.0)
}

fn y(reward: f64) -> f64 {
    BOTTOM - (BOTTOM - TOP) * reward.clamp(0.0, 1.0)
}

fn axes(picture: &mut String, tokens_max: f64) {
    for tenth in (0..=10).step_by(2) {
        let reward = f64::from(tenth) / 10.0;
        let faint = format!("stroke-opacity=\"{}\"", if tenth == 0 { 1.0 } else { 0.3 });
        picture.push_str(&stroke(LEFT, y(reward), RIGHT, y(reward), GREY, &faint));
        picture.push_str(&text(LEFT - 8.0, y(reward) + 4.0, "end", &format!("{reward:.1}")));
    }
    let step = tick_step(tokens_max);
    let mut tokens = 0.0;
    while tokens <= tokens_max {
        picture.push_str(&stroke(x(tokens, tokens_max), BOTTOM, x(tokens, tokens_max), BOTTOM + 5.0, GREY, ""));
        picture.push_str(&text(x(tokens, tokens_max), BOTTOM + 20.0, "middle", &format!("{}", tokens / 1e3)));
        tokens += step;
    }
    picture.push_str(&text(f64::midpoint(LEFT, RIGHT), HEIGHT - 10.0, "middle", "tokens sampled (thousands)"));
    let (across, down) = (18.0, f64::midpoint(TOP, BOTTOM));
    let label = format!("mean reward of {WINDOW} batches (0 to 1)");
    let turned = format!("<g transform=\"rotate(-90 {across} {down})\">{}</g>\n", text(across, down, "middle", &label));
    picture.push_str(&turned);
}

/// 1, 2 or 5 times a power of ten, so that there are few ticks.
fn tick_step(tokens_max: f64) -> f64 {
    let mut power = 1.0;
    loop {
        for factor in [1.0, 2.0, 5.0] {
            if tokens_max / (factor * power) <= TICKS_MAX {
                return factor * power;
            }
        }
        power *= 10.0;
    }
}

fn stroke(x1: f64, y1: f64, x2: f64, y2: f64, colour: &str, style: &str) -> String {
    format!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" {style}/>\n")
}

fn text(x: f64, y: f64, anchor: &str, words: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{GREY}\">{words}</text>\n")
}

fn running_mean(run: &[(f64, f64)]) -> Run {
    let ends = run.iter().enumerate();
    ends.filter_map(|(end, (tokens, _))| {
        let window = run.get((end + 1).saturating_sub(WINDOW)..=end)?;
        Some((*tokens, window.iter().map(|(_, reward)| reward).sum::<f64>() / window.len() as f64))
    })
    .collect()
}

/// The mean of several runs at even places, from where all have begun to where one has ended.
fn mean_of(runs: &[Run], tokens_max: f64) -> Run {
    let places = (0..=PLACES).map(|place| tokens_max * place as f64 / PLACES as f64);
    let mean = |tokens: f64| {
        let rewards: Vec<f64> = runs.iter().map(|run| reward_at(run, tokens)).collect::<Option<_>>()?;
        if rewards.is_empty() { None } else { Some((tokens, rewards.iter().sum::<f64>() / rewards.len() as f64)) }
    };
    places.filter_map(mean).collect()
}

/// The reward at so many tokens, on the straight line between the updates before and after.
fn reward_at(run: &[(f64, f64)], tokens: f64) -> Option<f64> {
    let (before, after) = run.split_at(run.partition_point(|(drawn, _)| *drawn <= tokens));
    let (&(low, from), &(high, to)) = match (before.last(), after.first()) {
        (Some(before), Some(after)) => (before, after),
        (Some(last), None) if last.0 >= tokens => (last, last),
        _ => return None,
    };
    let share = if high > low { (tokens - low) / (high - low) } else { 0.0 };
    Some(from + share * (to - from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_smoothed_and_averaged_where_all_of_them_are() {
        let run: Run = (1..=12).map(|update| (f64::from(update), f64::from(update % 2))).collect();
        let smooth = running_mean(&run);
        assert_eq!((smooth[0], smooth[1], smooth[11]), ((1.0, 1.0), (2.0, 0.5), (12.0, 0.5)));
        let runs = [vec![(0.0, 0.0), (100.0, 1.0)], vec![(50.0, 1.0), (200.0, 1.0)]];
        let mean = mean_of(&runs, 200.0);
        assert_eq!((mean[0], mean[mean.len() - 1]), ((50.0, 0.75), (100.0, 1.0)));
        assert!(mean_of(&[], 200.0).is_empty() && mean_of(&[vec![]], 200.0).is_empty());
    }

    #[test]
    fn ticks_are_few_and_round() {
        let steps = [8.0, 9.0, 20_000.0, 800_000.0].map(|tokens_max| tick_step(tokens_max).to_string());
        assert_eq!(steps, ["1", "2", "5000", "100000"]);
    }

    #[test]
    fn the_picture_has_axes_with_units_and_a_name_for_each_line() {
        let curve = |name, reward| Curve { name, runs: vec![vec![(0.0, reward), (1_000.0, reward)]; 2] };
        let svg = svg(&[curve("grpo", 0.0), curve("ppo", 1.0)], 1_000.0);
        for part in ["tokens sampled (thousands)", "mean reward", ">grpo<", ">ppo<", ">0.2<", ">1<"] {
            assert!(svg.contains(part), "no {part} in {svg}");
        }
        // Two thin lines and a mean for each, the one along the bottom and the other along the top.
        assert_eq!(svg.matches("<polyline").count(), 6);
        assert_eq!(svg.matches(&format!("points=\"{LEFT:.1},{BOTTOM:.1} ")).count(), 3);
        assert_eq!(svg.matches(&format!(" {RIGHT:.1},{TOP:.1}\"")).count(), 3);
        assert!(!svg.contains("NaN") && !svg.contains("background"));
    }
}
