//! A progress bar, where somebody watches.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Steps of a row.
const STEPS: u32 = 100;
/// How often the bar shows that time passes.
const TICK: Duration = Duration::from_millis(500);

/// How far a run is. It is drawn on standard error, and only on a terminal.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    rows: u64,
}

impl Progress {
    /// A run of `rows` rows.
    pub(crate) fn new(rows: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self {
                bar: ProgressBar::hidden(),
                rows,
            };
        }
        let bar = ProgressBar::new(rows * u64::from(STEPS));
        // The last part is cut where the line ends: a bar over two lines could not be drawn over.
        let template = "{bar:20} {prefix} {elapsed} {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        let this = Self { bar, rows };
        this.count();
        this
    }

    /// What is being measured now.
    pub(crate) fn at(&self, what: String) {
        self.bar.set_message(what);
    }

    /// A row has so many of its rounds behind it.
    pub(crate) fn round_done(&self, done: u32, of: u32) {
        let row = self.bar.position() / u64::from(STEPS);
        // The last step is taken by the row's end.
        let step = (STEPS * done / of.max(1)).min(STEPS - 1);
        self.bar
            .set_position(row * u64::from(STEPS) + u64::from(step));
    }

    /// A row is done.
    pub(crate) fn row_done(&self) {
        let rows = self.bar.position() / u64::from(STEPS) + 1;
        self.bar.set_position(rows * u64::from(STEPS));
        self.count();
    }

    fn count(&self) {
        let done = self.bar.position() / u64::from(STEPS);
        self.bar.set_prefix(format!("{done}/{}", self.rows));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
