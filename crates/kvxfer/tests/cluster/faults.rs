//! What goes wrong, and how often.

use super::bug::Step;
use super::qp::{Loss, QpState};
use super::rng::Rng;
use super::world::{MS, World, log};

/// A thing that befalls the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Kill,
    HostLost,
    Leave,
    Stop,
    Continue,
    Birth,
    Cut,
    Silence,
    RailDown,
    RailUp,
    LoseRequests,
    LoseAnswers,
    RequestsComeAfterAll,
    QueuePairDies,
    RailDies,
    ClockJumps,
}

const FAULTS: [Fault; 16] = [
    Fault::Kill,
    Fault::HostLost,
    Fault::Leave,
    Fault::Stop,
    Fault::Continue,
    Fault::Birth,
    Fault::Cut,
    Fault::Silence,
    Fault::RailDown,
    Fault::RailUp,
    Fault::LoseRequests,
    Fault::LoseAnswers,
    Fault::RequestsComeAfterAll,
    Fault::QueuePairDies,
    Fault::RailDies,
    Fault::ClockJumps,
];

/// The rates of one history, in thousandths of the chances.
#[derive(Debug)]
pub(crate) struct Faults {
    /// Steps at which something of `kinds` happens.
    pub(crate) often: u64,
    kinds: Vec<Fault>,
    /// Requests that end in an error of their own.
    pub(crate) completion: u64,
    /// Posts that the device does not take whole.
    pub(crate) post: u64,
    /// Engines whose clock runs wrong.
    pub(crate) drift: u64,
    /// How often an author gives something up.
    pub(crate) gives_up: u64,
    /// Deadlines and leases that are short.
    pub(crate) hurry: u64,
    /// Steps at which some card puts a write in memory that nothing has forced there.
    pub(crate) cards: u64,
}

impl Faults {
    pub(crate) fn choose(rng: &mut Rng) -> Self {
        let quiet = rng.permille(120);
        let mut rate = |chance: u64, most: u64| {
            if quiet || !rng.permille(chance) {
                0
            } else {
                1 + rng.below(most)
            }
        };
        let (often, completion) = (rate(800, 40), rate(500, 20));
        let (post, drift) = (rate(300, 20), rate(300, 500));
        let (gives_up, hurry) = (rate(700, 250), rate(700, 600));
        let kinds: Vec<Fault> = FAULTS
            .into_iter()
            .filter(|kind| match kind {
                // What heals always may.
                Fault::Continue | Fault::Birth | Fault::RailUp => true,
                _ => rng.permille(450),
            })
            .collect();
        Self {
            often,
            kinds,
            completion,
            post,
            drift,
            gives_up,
            hurry,
            cards: if rng.permille(500) { 100 } else { 2 },
        }
    }

    /// Nothing goes wrong in this history: all that is begun ends well.
    pub(crate) fn quiet(&self) -> bool {
        self.often + self.completion + self.post + self.drift + self.gives_up + self.hurry == 0
    }
}

impl World {
    fn some_life(&mut self, of: impl Fn(&World, usize) -> bool) -> Option<usize> {
        let those: Vec<usize> = (0..self.lives.len()).filter(|l| of(self, *l)).collect();
        (!those.is_empty()).then(|| those[self.rng.index(those.len())])
    }

    fn some_qp(&mut self) -> Option<usize> {
        let works: Vec<usize> = (0..self.qps.len())
            .filter(|q| self.qps[*q].works() && self.qps[*q].lane.is_some())
            .collect();
        (!works.is_empty()).then(|| works[self.rng.index(works.len())])
    }

    pub(crate) fn something_fails(&mut self) -> Step {
        if self.faults.kinds.is_empty() {
            return Ok(());
        }
        let kind = self.faults.kinds[self.rng.index(self.faults.kinds.len())];
        let running = |w: &World, l: usize| w.runs(l) && !w.lives[l].leaving;
        match kind {
            Fault::Kill => {
                if let Some(life) = self.some_life(|w, l| w.lives[l].alive) {
                    self.sum.count("fault: killed");
                    self.death(life, false)?;
                }
            }
            Fault::HostLost => {
                if let Some(life) = self.some_life(|w, l| w.lives[l].alive) {
                    self.sum.count("fault: host lost");
                    self.death(life, true)?;
                }
            }
            Fault::Leave => {
                if let Some(life) = self.some_life(running) {
                    self.sum.count("fault: shut down");
                    log!(self, "life {life} is shut down");
                    self.lives[life].leaving = true;
                    self.shut_down(life)?;
                }
            }
            Fault::Stop => {
                if let Some(life) = self.some_life(running) {
                    self.sum.count("fault: stopped");
                    log!(self, "life {life} is stopped");
                    self.lives[life].stopped = true;
                }
            }
            Fault::Continue => {
                if let Some(life) = self.some_life(|w, l| w.lives[l].stopped) {
                    self.continues(life);
                }
            }
            Fault::Birth => {
                let empty: Vec<usize> = (0..self.slots.len())
                    .filter(|s| self.slots[*s].is_none())
                    .collect();
                if !empty.is_empty() {
                    self.sum.count("fault: restarted");
                    let slot = empty[self.rng.index(empty.len())];
                    self.birth(slot);
                }
            }
            Fault::Cut => {
                if let Some(conn) = self.some_conn() {
                    self.sum.count("fault: connection cut");
                    log!(self, "connection {conn} is cut");
                    self.conns[conn].cut = true;
                }
            }
            Fault::Silence => {
                if let Some(conn) = self.some_conn() {
                    self.sum.count("fault: connection silent");
                    log!(self, "connection {conn} falls silent");
                    self.conns[conn].silent ^= true;
                }
            }
            Fault::RailDown | Fault::RailUp => {
                let up = kind == Fault::RailUp;
                let rail = self.rng.index(2);
                if let Some(life) =
                    self.some_life(|w, l| w.lives[l].alive && w.lives[l].rails[rail] != up)
                {
                    self.sum.count(if up {
                        "fault: rail up again"
                    } else {
                        "fault: rail down"
                    });
                    log!(self, "rail {rail} of life {life} is up: {up}");
                    self.lives[life].rails[rail] = up;
                }
            }
            Fault::LoseRequests | Fault::LoseAnswers => {
                if let Some(q) = self.some_qp() {
                    log!(self, "queue pair {q}: {kind:?}");
                    if self.qps[q].loss != Loss::Answers {
                        let (loss, name) = match kind {
                            Fault::LoseAnswers => (Loss::Answers, "fault: answers lost"),
                            _ => (Loss::Requests, "fault: requests held up"),
                        };
                        self.sum.count(name);
                        self.qps[q].loss = loss;
                    }
                }
            }
            Fault::RequestsComeAfterAll => self.requests_come(),
            Fault::QueuePairDies => {
                if let Some(q) = self.some_qp() {
                    self.sum.count("fault: queue pair in error, nobody named");
                    log!(self, "queue pair {q} dies");
                    self.qp_flush(q, None)?;
                    // A device may say so before it flushes.
                    let (life, w) = (self.qps[q].life, self.qps[q].worker);
                    self.lives[life].workers[w].awake = true;
                }
            }
            Fault::RailDies => {
                if let Some(q) = self.some_qp() {
                    self.sum.count("fault: all queue pairs of a rail in error");
                    let (life, rail) = (self.qps[q].life, self.qps[q].rail);
                    log!(self, "rail {rail} of life {life} fails");
                    for q in 0..self.qps.len() {
                        let qp = &self.qps[q];
                        if (qp.life, qp.rail) == (life, rail) && qp.works() && qp.lane.is_some() {
                            self.qp_flush(q, None)?;
                        }
                    }
                    for worker in &mut self.lives[life].workers {
                        worker.awake = true;
                    }
                }
            }
            Fault::ClockJumps => {
                if let Some(life) = self.some_life(running) {
                    self.sum.count("fault: clock jumps");
                    let most = if self.rng.permille(200) {
                        40 * MS
                    } else {
                        2 * MS
                    };
                    let by = self.rng.below(most);
                    log!(self, "the clock of life {life} jumps by {} us", by / 1000);
                    self.lives[life].clock.0 += by;
                    self.pass(1)?;
                }
            }
        }
        Ok(())
    }

    fn requests_come(&mut self) {
        for qp in &mut self.qps {
            if qp.loss == Loss::Requests {
                qp.loss = Loss::Nothing;
            }
        }
    }

    fn continues(&mut self, life: usize) {
        self.sum.count("fault: continued");
        log!(self, "life {life} goes on");
        self.lives[life].stopped = false;
        for worker in &mut self.lives[life].workers {
            worker.awake = true;
        }
    }

    /// The process ends, or its host does, which nobody hears of.
    pub(crate) fn death(&mut self, life: usize, silently: bool) -> Step {
        log!(self, "life {life} ends, silently: {silently}");
        self.lives[life].alive = false;
        self.lives[life].stopped = false;
        let slot = self.lives[life].slot;
        self.slots[slot] = None;
        for q in 0..self.qps.len() {
            if self.qps[q].life == life {
                // What has left the process may still arrive.
                let keep = if silently {
                    self.qps[q].flow.len()
                } else {
                    usize::MAX
                };
                self.qps[q].flow.truncate(keep);
                self.qps[q].sq.clear();
                self.qps[q].state = QpState::Destroyed;
                self.qps[q].serving = false;
            }
        }
        self.links_die(life, silently);
        Ok(())
    }

    /// All that can be mended is.
    pub(crate) fn heal(&mut self) -> Step {
        for life in 0..self.lives.len() {
            if self.lives[life].stopped {
                self.continues(life);
            }
            self.lives[life].rails = [true; 2];
            if self.lives[life].alive && self.lives[life].leaving {
                self.death(life, false)?;
            }
        }
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_none() {
                self.birth(slot);
            }
        }
        for conn in &mut self.conns {
            conn.silent = false;
        }
        self.requests_come();
        if !self.faults.quiet() {
            for qp in &mut self.qps {
                qp.patience.get_or_insert(4 * MS);
            }
        }
        Ok(())
    }
}
