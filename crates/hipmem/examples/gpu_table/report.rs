//! What is measured in turns, and how it is told: a table for people, JSON lines for others.

use std::fmt::Write as _;
use std::time::Duration;

use super::Result;

/// Turns that each thing is measured in; medians are shown.
const ROUNDS: usize = 9;

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Something that is measured in turns with others.
pub(super) struct Case<'a> {
    name: String,
    bytes: u64,
    /// What it should have of the limit.
    wanted: Option<f64>,
    run: Box<dyn FnMut() -> Result<Duration> + 'a>,
    times: Vec<Duration>,
}

impl<'a> Case<'a> {
    pub(super) fn new(
        name: impl Into<String>,
        bytes: u64,
        wanted: Option<f64>,
        run: impl FnMut() -> Result<Duration> + 'a,
    ) -> Self {
        Self {
            name: name.into(),
            bytes,
            wanted,
            run: Box::new(run),
            times: Vec::new(),
        }
    }
}

/// What is printed, and what is written.
#[derive(Default)]
pub(super) struct Report {
    pub(super) json: String,
    pub(super) short: usize,
}

impl Report {
    fn head(&self, title: &str) {
        println!(
            "\n{title}\n{:<46} {:>9} {:>9} {:>7} {:>7}",
            "", "GB/s", "ms", "of", "wanted"
        );
    }

    /// Runs the cases in turns; the first is the limit of the others.
    pub(super) fn compare(&mut self, way: &str, mut cases: Vec<Case<'_>>) {
        self.head(way);
        let mut failed = vec![None; cases.len()];
        for round in 0..=ROUNDS {
            for (case, failed) in cases.iter_mut().zip(&mut failed) {
                if failed.is_some() {
                    continue;
                }
                match (case.run)() {
                    // The first turn warms up.
                    Ok(took) if round > 0 => case.times.push(took),
                    Ok(_) => {}
                    Err(e) => *failed = Some(e.to_string()),
                }
            }
        }
        let mut limit = 0.0;
        for (i, (case, failed)) in cases.iter_mut().zip(failed).enumerate() {
            let name = &case.name;
            if let Some(why) = failed {
                self.short += 1;
                println!("{name:<46} FAILED: {why}");
                continue;
            }
            let took = median(&mut case.times).as_secs_f64();
            let speed = case.bytes as f64 / took / 1e9;
            if i == 0 {
                limit = speed;
            }
            let of = speed / limit;
            let (wanted, verdict) = match case.wanted {
                Some(wanted) if of < wanted => (format!("{wanted:.2}"), " SHORT"),
                Some(wanted) => (format!("{wanted:.2}"), ""),
                None => (String::new(), ""),
            };
            self.short += usize::from(!verdict.is_empty());
            let ms = took * 1e3;
            println!("{name:<46} {speed:>9.1} {ms:>9.3} {of:>7.3} {wanted:>7}{verdict}");
            let wanted = case.wanted.map_or("null".to_owned(), |w| w.to_string());
            let _ = writeln!(
                self.json,
                "{{\"way\":\"{way}\",\"case\":\"{name}\",\"bytes\":{},\"gbs\":{speed:.2},\"ms\":{ms:.4},\"of\":{of:.4},\"wanted\":{wanted}}}",
                case.bytes
            );
        }
    }

    /// Times in microseconds.
    pub(super) fn times(&mut self, name: &str, mut times: Vec<Duration>, wanted: Option<f64>) {
        let half = median(&mut times).as_secs_f64() * 1e6;
        let late = times
            .get(times.len() * 99 / 100)
            .copied()
            .unwrap_or_default();
        let late = late.as_secs_f64() * 1e6;
        let over = wanted.is_some_and(|wanted| half > wanted);
        self.short += usize::from(over);
        let words = wanted.map_or(String::new(), |w| {
            format!("  wanted {w} us{}", if over { " SHORT" } else { "" })
        });
        println!("{name:<58} {half:>9.2} us, 99 of 100 {late:>9.2} us{words}");
        let wanted = wanted.map_or("null".to_owned(), |w| w.to_string());
        let _ = writeln!(
            self.json,
            "{{\"case\":\"{name}\",\"us\":{half:.3},\"us_p99\":{late:.3},\"wanted\":{wanted}}}"
        );
    }
}
