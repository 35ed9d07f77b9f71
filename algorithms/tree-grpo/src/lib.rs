//! Credit through forks: Tree-GRPO, and Monte-Carlo values of states. See the README.

mod config;
pub mod monte_carlo;
pub mod tree;

use std::collections::BTreeMap;

use fulgurite_policy_gradient::{Credit, Flat, Learner, Rollout, State, sample};
use fulgurite_sdk::Mode;
use fulgurite_sdk::algorithm::rollouts::{self, Group};
use fulgurite_sdk::algorithm::trajectories::{Trajectory, TransitionId};
use fulgurite_sdk::algorithm::{Algorithm, AlgorithmError, Progress, metrics};

pub use config::{Config, Method};
use monte_carlo::Outcomes;
use tree::{Branch, Branches, Fork};

/// The algorithm.
#[derive(Debug)]
pub struct TreeGrpo {
    config: Config,
    learner: Learner,
}

impl Algorithm for TreeGrpo {
    const NAME: &'static str = "tree-grpo";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Config = Flat<Config>;
    type State = State;

    fn init(Flat(config): Flat<Config>, saved: Option<State>) -> Result<Self, AlgorithmError> {
        let settings = config.settle().map_err(AlgorithmError::InvalidConfig)?;
        Ok(Self { config, learner: Learner::new(settings, saved) })
    }

    fn step(&mut self) -> Result<Progress, AlgorithmError> {
        if !self.learner.start()? {
            return Ok(Progress::Done);
        }
        let roots = self.roots()?;
        let (rollouts, credits) = match self.config.method {
            Method::Tree => self.grow(roots)?,
            Method::MonteCarlo => self.evaluate(roots)?,
        };
        self.learner.learn(sample::samples(&rollouts, credits))?;
        Ok(self.learner.end())
    }

    fn save(&self) -> State {
        self.learner.save()
    }
}

/// Rollouts that stay in the batch, and the credit of their calls.
type Credited = (Vec<Rollout>, Vec<Option<Vec<Credit>>>);

impl TreeGrpo {
    /// Rolls out from the start.
    fn roots(&mut self) -> Result<Vec<Rollout>, AlgorithmError> {
        let section = &self.learner.settings().rollouts;
        let (count, size) = (section.groups_per_step, section.group_size);
        let items = self.learner.items(count)?;
        let sampling = self.learner.sampling();
        let groups: Vec<Group> = items.iter().map(|item| Group::new(item.id(), size).sampling(sampling)).collect();
        let ended = rollouts::enqueue(&groups)?.await_all(None)?;
        Ok(ended.iter().map(|trajectory| self.read(trajectory.group(), trajectory)).collect())
    }

    fn read(&self, group: usize, trajectory: &Trajectory) -> Rollout {
        Rollout::read(group, trajectory, &self.learner.settings().rollouts)
    }

    /// Forks, round by round, and compares.
    fn grow(&mut self, roots: Vec<Rollout>) -> Result<Credited, AlgorithmError> {
        let mut branches: Branches =
            roots.iter().enumerate().map(|(tree, root)| (root.id.clone(), Branch { tree, prefix: vec![] })).collect();
        let mut all = roots;
        for round in 0..self.config.rounds {
            let forks = self.choose(&all, &branches, round);
            all = self.fork(all, &forks, &mut branches)?;
        }
        metrics::scalar("forks", branches.values().filter(|branch| !branch.prefix.is_empty()).count() as f64)?;
        let rollouts = self.learner.see(all)?;
        let divergence = self.learner.divergence(&rollouts)?;
        let credits = tree::credits(&rollouts, &branches, &divergence, self.config.epsilon);
        Ok((rollouts, credits))
    }

    /// Where each tree is forked in a round.
    fn choose(&self, all: &[Rollout], branches: &Branches, round: u32) -> Vec<Fork> {
        let mut trees: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (place, rollout) in all.iter().enumerate() {
            if let Some(branch) = branches.get(&rollout.id) {
                trees.entry(branch.tree).or_default().push(place);
            }
        }
        let mut draw = self.learner.draw(&format!("forks of round {round}"));
        let mut forks = vec![];
        for places in trees.values() {
            forks
                .extend((0..self.config.forks_per_tree).filter_map(|_| tree::choose(all, branches, places, &mut draw)));
        }
        forks
    }

    /// Makes forks, and adds them to the rollouts.
    fn fork(
        &self,
        mut all: Vec<Rollout>,
        forks: &[Fork],
        branches: &mut Branches,
    ) -> Result<Vec<Rollout>, AlgorithmError> {
        let ancestors: Vec<(&Fork, &Rollout)> =
            forks.iter().filter_map(|fork| Some((fork, all.get(fork.ancestor)?))).collect();
        let groups: Vec<Group> = ancestors.iter().map(|(fork, ancestor)| self.group(ancestor, fork.event, 1)).collect();
        let ended = rollouts::enqueue(&groups)?.await_all(None)?;
        let mut made = vec![];
        for trajectory in &ended {
            if let Some((fork, ancestor)) = ancestors.get(trajectory.group()) {
                branches.insert(trajectory.rollout_id(), fork.branch.clone());
                made.push(self.read(ancestor.group, trajectory));
            }
        }
        all.extend(made);
        Ok(all)
    }

    fn group(&self, ancestor: &Rollout, event: u64, count: u32) -> Group {
        let group = Group::new(ancestor.item.clone(), count).sampling(self.learner.sampling());
        group.fork_of(ancestor.id.clone(), event)
    }

    /// Estimates what the state of each call is worth.
    fn evaluate(&mut self, roots: Vec<Rollout>) -> Result<Credited, AlgorithmError> {
        let rollouts = self.learner.see(roots)?;
        let outcomes = self.outcomes(&rollouts)?;
        let credits = monte_carlo::credits(&rollouts, &outcomes);
        Ok((rollouts, credits))
    }

    /// Goes on from the state of each call but the first.
    fn outcomes(&self, rollouts: &[Rollout]) -> Result<Outcomes, AlgorithmError> {
        let count = self.config.forks_per_state;
        let (mut groups, mut states): (Vec<Group>, Vec<&TransitionId>) = (vec![], vec![]);
        for rollout in rollouts.iter().filter(|rollout| rollout.reward.is_some()) {
            for call in rollout.calls.iter().skip(1) {
                groups.push(self.group(rollout, call.event, count).mode(Mode::Val));
                states.push(&call.id);
            }
        }
        if groups.is_empty() {
            return Ok(Outcomes::new());
        }
        let ended = rollouts::enqueue(&groups)?.await_all(None)?;
        let mut outcomes = Outcomes::new();
        for trajectory in &ended {
            let reward = self.read(0, trajectory).shaped_reward();
            if let (Some(state), Some(reward)) = (states.get(trajectory.group()), reward) {
                outcomes.entry((*state).clone()).or_default().push(reward);
            }
        }
        metrics::scalar("estimates", ended.len() as f64)?;
        Ok(outcomes)
    }
}

fulgurite_sdk::algorithm!(TreeGrpo);
