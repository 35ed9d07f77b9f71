//! Which items are worth another look: pools by how well each of them went last (prime-rl). The caller keeps the latest mean
//! reward of each item's group and asks what the item weighs.

/// How hard an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pool {
    /// It was never seen.
    Unseen,
    /// Its group hardly ever succeeds.
    Hard,
    /// In between: its rollouts differ, so there is something to learn.
    Normal,
    /// Its group nearly always succeeds.
    Easy,
}

/// Where the pools begin and what their items weigh. Defaults as prime-rl.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pools {
    /// Largest mean reward of a hard item. 0.25.
    pub hard_reward_max: f64,
    /// Largest mean reward of a normal item. 0.75.
    pub normal_reward_max: f64,
    /// Weight of hard items. 0.2.
    pub hard_weight: f64,
    /// Weight of normal items. 1.
    pub normal_weight: f64,
    /// Weight of easy items. 0.2.
    pub easy_weight: f64,
    /// Weight of items that were never seen. 1.
    pub unseen_weight: f64,
}

impl Default for Pools {
    fn default() -> Self {
        Self {
            hard_reward_max: 0.25,
            normal_reward_max: 0.75,
            hard_weight: 0.2,
            normal_weight: 1.0,
            easy_weight: 0.2,
            unseen_weight: 1.0,
        }
    }
}

impl Pools {
    /// The pool of an item whose latest group had this mean reward; none, or one that is no number, is of no group yet.
    #[must_use]
    pub fn of(&self, latest: Option<f64>) -> Pool {
        match latest.filter(|mean| !mean.is_nan()) {
            None => Pool::Unseen,
            Some(mean) if mean <= self.hard_reward_max => Pool::Hard,
            Some(mean) if mean <= self.normal_reward_max => Pool::Normal,
            Some(_) => Pool::Easy,
        }
    }

    /// What an item of the pool weighs.
    #[must_use]
    pub const fn weight(&self, pool: Pool) -> f64 {
        match pool {
            Pool::Unseen => self.unseen_weight,
            Pool::Hard => self.hard_weight,
            Pool::Normal => self.normal_weight,
            Pool::Easy => self.easy_weight,
        }
    }

    /// Probability with which an item that was drawn is taken: its weight as a share of the largest one. Items that are drawn
    /// evenly and taken so are seen in proportion to their weights. 1 when no pool has a weight.
    #[must_use]
    pub fn acceptance(&self, latest: Option<f64>) -> f64 {
        let most = [self.hard_weight, self.normal_weight, self.easy_weight, self.unseen_weight]
            .into_iter()
            .fold(0.0, f64::max);
        if most > 0.0 { (self.weight(self.of(latest)) / most).clamp(0.0, 1.0) } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::near;

    #[test]
    fn pools_by_the_latest_mean() {
        let pools = Pools::default();
        let found =
            [None, Some(f64::NAN), Some(0.25), Some(0.26), Some(0.75), Some(0.76), Some(-3.0)].map(|r| pools.of(r));
        let expected = [Pool::Unseen, Pool::Unseen, Pool::Hard, Pool::Normal, Pool::Normal, Pool::Easy, Pool::Hard];
        assert_eq!(found, expected);
        near(&[None, Some(0.0), Some(0.5), Some(1.0)].map(|r| pools.acceptance(r)), &[1.0, 0.2, 1.0, 0.2], 0.0);
        let none = Pools { hard_weight: 0.0, normal_weight: 0.0, easy_weight: 0.0, unseen_weight: 0.0, ..pools };
        near(&[none.acceptance(Some(0.5))], &[1.0], 0.0);
        let twice = Pools { normal_weight: 2.0, ..pools };
        near(&[None, Some(0.0), Some(0.5)].map(|r| twice.acceptance(r)), &[0.5, 0.1, 1.0], 1e-12);
    }
}
