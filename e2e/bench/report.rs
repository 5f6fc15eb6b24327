//! What was measured, as a table and as JSON.

use std::time::Duration;

use serde_json::{Value, json};

/// Many measurements of one thing.
pub struct Samples {
    name: String,
    sorted: Vec<f64>,
}

impl Samples {
    /// Takes durations in any order; at least one.
    pub fn new(name: &str, durations: &[Duration]) -> Self {
        let mut sorted: Vec<f64> = durations.iter().map(|it| it.as_secs_f64() * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        assert!(!sorted.is_empty(), "{name}: nothing was measured");
        Self { name: name.to_owned(), sorted }
    }

    /// The smallest value that this share of the samples does not exceed, in milliseconds.
    pub fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.sorted.len() * percent).div_ceil(100).max(1);
        self.sorted[rank - 1]
    }

    /// The middle, in milliseconds.
    pub fn p50(&self) -> f64 {
        self.percentile(50)
    }
}

/// Everything of one run.
#[derive(Default)]
pub struct Report {
    samples: Vec<Samples>,
    figures: Vec<(String, f64, &'static str)>,
    goals: Vec<(String, f64, Goal)>,
}

/// What a figure should be.
#[derive(Debug, Clone, Copy)]
pub enum Goal {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

impl Report {
    /// Adds a row of times and gives its p50.
    pub fn times(&mut self, name: &str, durations: &[Duration]) -> f64 {
        let samples = Samples::new(name, durations);
        let p50 = samples.p50();
        self.samples.push(samples);
        p50
    }

    /// Adds a single figure.
    pub fn figure(&mut self, name: &str, value: f64, unit: &'static str) {
        self.figures.push((name.to_owned(), value, unit));
    }

    /// Adds a figure that has a goal.
    pub fn goal(&mut self, name: &str, value: f64, goal: Goal) {
        self.goals.push((name.to_owned(), value, goal));
    }

    /// For people.
    pub fn print(&self) {
        println!("\n{:<58} {:>7} {:>8} {:>8} {:>8}", "milliseconds", "samples", "p50", "p90", "p99");
        for it in &self.samples {
            let [p50, p90, p99] = [50, 90, 99].map(|percent| it.percentile(percent));
            println!("{:<58} {:>7} {p50:>8.3} {p90:>8.3} {p99:>8.3}", it.name, it.sorted.len());
        }
        println!();
        for (name, value, unit) in &self.figures {
            println!("{name:<66} {value:>10.2} {unit}");
        }
        println!();
        for (name, value, goal) in &self.goals {
            let (word, limit) = match goal {
                Goal::AtMost(limit) => ("at most", limit),
                Goal::AtLeast(limit) => ("at least", limit),
            };
            let verdict = if goal.is_met(*value) { "met" } else { "MISSED" };
            println!("{name:<58} {value:>10.2}  {word:>8} {limit:<6} {verdict}");
        }
    }

    /// For programs, on one line.
    pub fn json(&self) -> Value {
        let samples = self.samples.iter().map(|it| {
            let [p50, p90, p99] = [50, 90, 99].map(|percent| it.percentile(percent));
            json!({"name": it.name, "samples": it.sorted.len(), "ms": {"p50": p50, "p90": p90, "p99": p99}})
        });
        let figures =
            self.figures.iter().map(|(name, value, unit)| json!({"name": name, "value": value, "unit": unit}));
        let goals = self.goals.iter().map(|(name, value, goal)| {
            let (word, limit) = match goal {
                Goal::AtMost(limit) => ("at_most", limit),
                Goal::AtLeast(limit) => ("at_least", limit),
            };
            json!({"name": name, "value": value, word: limit, "met": goal.is_met(*value)})
        });
        json!({
            "times": samples.collect::<Vec<_>>(),
            "figures": figures.collect::<Vec<_>>(),
            "goals": goals.collect::<Vec<_>>(),
        })
    }
}
