//! The final table of a run.

use fulgurite_trainer::{Evaluation, RunResult, Score, StageReport};

use crate::terminal::{Style, paint};

/// The table of a training run, with the commands to look further.
pub(crate) fn of_run(result: &RunResult, colours: bool) -> String {
    let mut lines = vec![paint(
        &format!(
            "{:<22} {:>8} {:>8} {:>10} {:>7} {:>8} {:>9} {:>11} {:>7}",
            "held-out reward", "sampled", "greedy", "malformed", "steps", "seconds", "rollouts", "tokens", "failed"
        ),
        Style::Bold,
        colours,
    )];
    let reports = result.initial.iter().chain(&result.stages).chain(&result.controls).chain(&result.baselines);
    for report in reports {
        lines.push(row(report));
    }
    let run = &result.run;
    lines.extend(alarms(result, colours));
    lines.push(String::new());
    lines.push(format!("seed {}, training {:.1} s, run stored in {run}", result.seed, result.training_seconds));
    lines.push("look further:".to_owned());
    if let Some(stage) = result.stages.last() {
        let name = &stage.name;
        lines.push(format!("  fulgurite rollouts list --run {run} --stage eval-{name}-sampled"));
        lines.push(format!("  fulgurite rollouts show --run {run} eval-{name}-sampled-00000-0000"));
        lines.push(format!("  fulgurite run CONFIG --policy {run}/policies/{name}"));
        lines.push(format!("  tensorboard --logdir {run}/tensorboard      plot: {run}/reward.svg"));
    }
    lines.join("\n")
}

/// The alarms that were raised, one line for each metric of a stage.
fn alarms(result: &RunResult, colours: bool) -> Vec<String> {
    let mut lines = vec![];
    for report in result.stages.iter().chain(&result.controls) {
        let mut told: Vec<&str> = vec![];
        for alarm in &report.alarms {
            if told.contains(&alarm.metric.as_str()) {
                continue;
            }
            told.push(&alarm.metric);
            let times = report.alarms.iter().filter(|other| other.metric == alarm.metric).count();
            let times = if times == 1 { String::new() } else { format!(", and {} times after that", times - 1) };
            let text = format!("alarm: {} step {}: {}{times}", report.name, alarm.step, alarm.text);
            lines.push(paint(&text, Style::Yellow, colours));
        }
    }
    lines
}

fn row(report: &StageReport) -> String {
    let label = match report.kind.as_str() {
        "initial" => "before training".to_owned(),
        "stage" => format!("after {}", report.name),
        kind => format!("{kind} {}", report.name),
    };
    let held_out = format!(
        "{label:<22} {:>8.3} {:>8.3} {:>8.1} %",
        report.held_out_sampled,
        report.held_out_greedy,
        report.malformed * 100.0
    );
    if report.steps == 0 {
        return held_out;
    }
    format!(
        "{held_out} {:>7} {:>8.1} {:>9} {:>11} {:>7}",
        report.steps, report.seconds, report.rollouts, report.tokens, report.failed
    )
}

/// The table of an evaluation.
pub(crate) fn of_evaluation(evaluation: &Evaluation, run: &str, colours: bool) -> String {
    let head = format!("{:<10} {:>8} {:>9} {:>10}  outcomes", "held out", "reward", "rollouts", "malformed");
    let row = |name: &str, score: &Score| {
        let outcomes: Vec<_> = score.outcomes.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let (mean, rollouts, faults) = (score.mean, score.rollouts, score.policy_fault_share * 100.0);
        format!("{name:<10} {mean:>8.3} {rollouts:>9} {faults:>8.1} %  {}", outcomes.join(", "))
    };
    [
        paint(&head, Style::Bold, colours),
        row("sampled", &evaluation.sampled),
        row("greedy", &evaluation.greedy),
        String::new(),
        format!("run stored in {run}; look further: fulgurite rollouts list --run {run}"),
    ]
    .join("\n")
}
