//! Learning-rate schedules: factors with peak 1.

use crate::ensure;
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// How the learning rate moves over the steps: a factor on the optimiser's `lr`, which is the peak. All of them rise
/// linearly over `warmup` steps. Where `total` is absent, whoever knows how many steps there will be gives it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Then falls with 1/√step (Vaswani et al. 2017, section 5.3).
    Noam {
        /// Steps up to the peak.
        warmup: u64,
    },
    /// Then falls along a half cosine to `floor` at step `total` (Loshchilov and Hutter 2017).
    Cosine {
        /// Steps up to the peak.
        warmup: u64,
        /// The step at which the floor is reached.
        total: Option<u64>,
        /// The lowest factor.
        floor: f64,
    },
    /// Then falls linearly to `floor` at step `total`.
    Linear {
        /// Steps up to the peak.
        warmup: u64,
        /// The step at which the floor is reached.
        total: Option<u64>,
        /// The lowest factor.
        floor: f64,
    },
    /// Then stays.
    Constant {
        /// Steps up to the peak.
        warmup: u64,
    },
}

impl Default for Schedule {
    /// Always 1.
    fn default() -> Self {
        Schedule::Constant { warmup: 0 }
    }
}

impl Schedule {
    /// Refuses settings outside their domain.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Schedule::Noam { warmup } => {
                ensure!(
                    warmup >= 1,
                    Config,
                    "Noam: argument `warmup`: expected at least 1, got 0; use Constant instead"
                );
            }
            Schedule::Cosine { warmup, total, floor } | Schedule::Linear { warmup, total, floor } => {
                let name = self.name();
                ensure!((0.0..=1.0).contains(&floor), Config, "{name}: argument `floor`: expected 0 to 1, got {floor}");
                if let Some(total) = total {
                    ensure!(
                        total > warmup,
                        Config,
                        "{name}: argument `total`: expected more than warmup={warmup} steps, got {total}"
                    );
                }
            }
            Schedule::Constant { .. } => {}
        }
        Ok(())
    }

    /// The factor of a step, counted from 1. `total` is used where the schedule has none of its own.
    pub fn factor(&self, step: u64, total: Option<u64>) -> Result<f64> {
        let s = step as f64;
        let rise = |warmup: u64| if step < warmup { s / warmup as f64 } else { 1.0 };
        Ok(match *self {
            Schedule::Noam { warmup } => rise(warmup).min((warmup as f64 / s).sqrt()),
            Schedule::Constant { warmup } => rise(warmup),
            Schedule::Cosine { warmup, total: own, .. } | Schedule::Linear { warmup, total: own, .. }
                if step <= warmup =>
            {
                self.progress(warmup, warmup, own.or(total))?; // who will not get further hears so at once
                rise(warmup)
            }
            Schedule::Cosine { warmup, total: own, floor } => {
                let progress = self.progress(step, warmup, own.or(total))?;
                floor + (1.0 - floor) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress))
            }
            Schedule::Linear { warmup, total: own, floor } => {
                let progress = self.progress(step, warmup, own.or(total))?;
                floor + (1.0 - floor) * (1.0 - progress)
            }
        })
    }

    /// The way from the end of the warm-up to the end of training, 0 to 1.
    fn progress(&self, step: u64, warmup: u64, total: Option<u64>) -> Result<f64> {
        let name = self.name();
        let Some(total) = total else {
            crate::bail!(
                Config,
                "{name}: argument `total`: the number of steps is not known; pass total=, or train with fit"
            )
        };
        Ok(if step >= total { 1.0 } else { (step - warmup) as f64 / (total - warmup) as f64 })
    }

    fn name(&self) -> &'static str {
        match self {
            Schedule::Noam { .. } => "Noam",
            Schedule::Cosine { .. } => "Cosine",
            Schedule::Linear { .. } => "Linear",
            Schedule::Constant { .. } => "Constant",
        }
    }
}

/// The peak of the paper's schedule: d_model^-0.5 · warmup^-0.5.
pub fn paper_lr(d_model: usize, warmup: u64) -> f64 {
    1.0 / (d_model as f64 * warmup as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors<const N: usize>(schedule: &Schedule, total: Option<u64>, steps: [u64; N]) -> [f64; N] {
        steps.map(|step| schedule.factor(step, total).unwrap())
    }

    #[test]
    fn noam_is_the_papers_formula_over_its_peak() {
        let schedule = Schedule::Noam { warmup: 400 };
        for step in 1..2000u64 {
            let s = step as f64;
            let paper = 512f64.powf(-0.5) * s.powf(-0.5).min(s * 400f64.powf(-1.5));
            let ours = paper_lr(512, 400) * schedule.factor(step, None).unwrap();
            assert!((ours / paper - 1.0).abs() < 1e-12, "step {step}: {ours}, expected {paper}");
        }
        assert_eq!(factors(&schedule, None, [100, 400, 1600]), [0.25, 1.0, 0.5]);
    }

    #[test]
    fn cosine_linear_and_constant_by_hand() {
        let half = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * 0.5));
        let cosine = Schedule::Cosine { warmup: 10, total: Some(30), floor: 0.0 };
        assert_eq!(factors(&cosine, None, [1, 5, 10, 20, 30, 99]), [0.1, 0.5, 1.0, half, 0.0, 0.0]);
        let linear = Schedule::Linear { warmup: 0, total: None, floor: 0.5 };
        assert_eq!(factors(&linear, Some(8), [2, 4, 8, 9]), [0.875, 0.75, 0.5, 0.5]);
        assert_eq!(factors(&Schedule::Constant { warmup: 4 }, None, [1, 2, 4, 5]), [0.25, 0.5, 1.0, 1.0]);
        assert_eq!(factors(&Schedule::default(), None, [1, 1000]), [1.0, 1.0]);
    }

    #[test]
    fn its_own_total_wins_and_a_missing_one_is_an_error() {
        let linear = |total| Schedule::Linear { warmup: 2, total, floor: 0.0 };
        assert_eq!(linear(Some(4)).factor(3, Some(100)).unwrap(), 0.5);
        // At once, not when the warm-up is over.
        for step in [1, 2, 3] {
            assert!(linear(None).factor(step, None).unwrap_err().to_string().contains("`total`"));
        }
        // A total that came later may lie inside the warm-up.
        assert_eq!(linear(None).factor(3, Some(1)).unwrap(), 0.0);
    }

    #[test]
    fn settings_outside_their_domain_are_refused() {
        for schedule in [
            Schedule::Noam { warmup: 0 },
            Schedule::Cosine { warmup: 5, total: Some(5), floor: 0.0 },
            Schedule::Linear { warmup: 5, total: None, floor: 1.5 },
            Schedule::Linear { warmup: 5, total: None, floor: f64::NAN },
        ] {
            assert!(matches!(schedule.validate(), Err(crate::error::Error::Config(_))), "{schedule:?}");
        }
    }

    #[test]
    fn json_keeps_every_bit() {
        let schedule = Schedule::Cosine { warmup: 7, total: None, floor: 0.1 + 0.2 };
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
        assert!(serde_json::from_str::<Schedule>(r#"{"kind":"noam","warmup":1,"wramup":2}"#).is_err());
    }
}
