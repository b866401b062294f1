//! The router: it starts the two engines, sends them requests, and carries tickets between them.
//! It never touches a block, and does not know what is in a ticket.

use std::collections::{BTreeMap, HashMap};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kvxfer::event::{Cause, ReleaseReason};
use kvxfer::ticket::Ticket;
use kvxfer::transfer::Refusal;

use crate::message::{self, Answer, Ending, Job, Mode, Order, Story};
use crate::{Failed, Options};

/// Everything is over by then, or it has failed.
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Prefill,
    Decode,
}

/// An engine's process. It does not outlive its handle.
#[derive(Debug)]
struct Engine {
    process: Child,
    orders: ChildStdin,
}

impl Engine {
    fn order(&mut self, order: &Order) -> Result<(), Failed> {
        message::say(&mut self.orders, order)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // One that has ended already is left alone.
        if let Ok(None) = self.process.try_wait() {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

/// A request, as far as the router knows it.
#[derive(Debug)]
struct Underway {
    job: Job,
    /// A ticket that is kept back because the client has gone meanwhile.
    kept: Option<Ticket>,
    prefill: Option<Ending>,
    decode: Option<Ending>,
}

struct Router {
    prefill: Engine,
    decode: Engine,
    answers: Receiver<(Side, Option<Result<Answer, Failed>>)>,
    until: Instant,
    underway: HashMap<String, Underway>,
    stories: BTreeMap<Story, u32>,
    path: String,
    moved: u64,
    checked: u64,
}

/// Runs all requests in one mode. Returns the summary.
pub(crate) fn run(mode: Mode, options: &Options) -> Result<String, Failed> {
    let begun = Instant::now();
    let mut router = Router::start(options)?;
    let mut jobs = (0..options.requests).map(|i| job(mode, i));
    for job in jobs.by_ref().take(options.in_flight) {
        router.begin(job)?;
    }
    while !router.underway.is_empty() {
        if router.one_answer()? {
            // A place is free.
            jobs.next().map_or(Ok(()), |job| router.begin(job))?;
        }
    }
    router.finish()?;
    let mut stories = String::new();
    for (story, count) in &router.stories {
        let name = serde_json::to_string(story)?;
        stories += &format!(", {count} {}", name.trim_matches('"'));
    }
    let name = match mode {
        Mode::Read => "read",
        Mode::Write => "write",
    };
    Ok(format!(
        "{name}: {} requests{stories}; at most {} at a time, over {}; {} bytes moved, {} \
         checked, all right; {:.1} s",
        options.requests,
        options.in_flight,
        router.path,
        router.moved,
        router.checked,
        begun.elapsed().as_secs_f64(),
    ))
}

/// The i-th request: prompts of 3 to 12 blocks, and every story in its turn.
fn job(mode: Mode, i: u32) -> Job {
    let story = match (mode, i % 8) {
        (_, 3) => Story::Prefix,
        (_, 7) => Story::ClientGone,
        (Mode::Read, 5) => Story::FullHit,
        (Mode::Write, 1) => Story::LayersFirst,
        (Mode::Write, 4) => Story::Abort,
        (Mode::Write, 5) => Story::Chunked,
        _ => Story::Whole,
    };
    Job {
        request: format!("request-{i}"),
        tokens: 40 + i * 37 % 150,
        mode,
        story,
    }
}

/// How a request of this story must end, at the prefill and at the decode process.
fn expected(mode: Mode, story: Story) -> (Ending, Ending) {
    let failed = Ending::Failed;
    match (mode, story) {
        // Whoever made the ticket has it back; the other side is told why it is worth nothing.
        (Mode::Read, Story::ClientGone) => (
            Ending::Released(ReleaseReason::Retracted),
            failed(Cause::LeaseExpired),
        ),
        (Mode::Write, Story::ClientGone) => {
            let reason = Refusal::Late;
            (failed(Cause::Refused { reason }), failed(Cause::Cancelled))
        }
        (Mode::Write, Story::Abort) => (failed(Cause::Cancelled), failed(Cause::Aborted)),
        (Mode::Read, _) => (Ending::Released(ReleaseReason::AllRead), Ending::Received),
        (Mode::Write, _) => (Ending::Sent, Ending::Received),
    }
}

impl Router {
    fn start(options: &Options) -> Result<Self, Failed> {
        let (sender, answers) = channel();
        let engine = |side: Side, name: &str| -> Result<Engine, Failed> {
            let mut process = Command::new(std::env::current_exe()?)
                .args(["--engine", name, "--path", &options.path])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let (orders, out) = (process.stdin.take(), process.stdout.take());
            let orders = orders.ok_or("a pipe was asked for")?;
            let out = out.ok_or("a pipe was asked for")?;
            message::listen(out, sender.clone(), move |answer| (side, answer));
            Ok(Engine { process, orders })
        };
        let mut router = Self {
            prefill: engine(Side::Prefill, "prefill")?,
            decode: engine(Side::Decode, "decode")?,
            answers,
            until: Instant::now() + LIMIT,
            underway: HashMap::new(),
            stories: BTreeMap::new(),
            path: String::new(),
            moved: 0,
            checked: 0,
        };
        let Answer::Listening { address } = router.answer()?.1 else {
            return Err("the prefill process does not listen".into());
        };
        router.decode.order(&Order::Connect { address })?;
        // Each says so for itself: a session stands a moment earlier on one side.
        for _ in 0..2 {
            let Answer::Connected { path } = router.answer()?.1 else {
                return Err("the engines do not connect".into());
            };
            router.path = path;
        }
        Ok(router)
    }

    /// The next answer of either engine.
    fn answer(&self) -> Result<(Side, Answer), Failed> {
        let left = self.until.saturating_duration_since(Instant::now());
        let (side, answer) = self.answers.recv_timeout(left).map_err(|_| {
            let open: Vec<&str> = self.underway.keys().map(String::as_str).collect();
            format!("not over after {LIMIT:?}; under way: {}", open.join(", "))
        })?;
        match answer {
            Some(answer) => Ok((side, answer?)),
            None => Err(format!("the {side:?} process has ended too early").into()),
        }
    }

    /// READ begins with prefill, whose ticket decode needs; WRITE with decode, whose ticket prefill
    /// needs, unless prefill is to begin without one.
    fn begin(&mut self, job: Job) -> Result<(), Failed> {
        *self.stories.entry(job.story).or_default() += 1;
        let first = match (job.mode, job.story) {
            (Mode::Read, _) | (_, Story::LayersFirst) => &mut self.prefill,
            (Mode::Write, _) => &mut self.decode,
        };
        first.order(&Order::Start {
            job: job.clone(),
            kv_transfer_params: None,
        })?;
        let underway = Underway {
            job: job.clone(),
            kept: None,
            prefill: None,
            decode: None,
        };
        self.underway.insert(job.request, underway);
        Ok(())
    }

    /// Handles one answer; says whether a request is over with it.
    fn one_answer(&mut self) -> Result<bool, Failed> {
        let (side, answer) = self.answer()?;
        match answer {
            Answer::Ticket {
                request,
                kv_transfer_params,
            } => {
                let underway = self.underway.get_mut(&request);
                let underway = underway.ok_or("a ticket of no request")?;
                match underway.job.story {
                    // The engines have settled it between themselves.
                    Story::LayersFirst => {}
                    Story::ClientGone => {
                        underway.kept = Some(kv_transfer_params);
                        let maker = match side {
                            Side::Prefill => &mut self.prefill,
                            Side::Decode => &mut self.decode,
                        };
                        maker.order(&Order::TakeBack { request })?;
                    }
                    _ => self.relay(side, &request, kv_transfer_params)?,
                }
                Ok(false)
            }
            Answer::Pushing { request } => {
                let underway = self.underway.get(&request).ok_or("a push of no request")?;
                self.decode.order(&Order::Start {
                    job: underway.job.clone(),
                    kv_transfer_params: None,
                })?;
                Ok(false)
            }
            Answer::Finished {
                request,
                ending,
                moved,
                checked,
            } => {
                self.moved += moved;
                self.checked += checked;
                self.ended(side, &request, ending)
            }
            other => Err(format!("unexpected from the {side:?} process: {other:?}").into()),
        }
    }

    /// Carries a ticket from the side that made it to the other.
    fn relay(&mut self, from: Side, request: &str, ticket: Ticket) -> Result<(), Failed> {
        let underway = self.underway.get(request).ok_or("no such request")?;
        let other = match from {
            Side::Prefill => &mut self.decode,
            Side::Decode => &mut self.prefill,
        };
        other.order(&Order::Start {
            job: underway.job.clone(),
            kv_transfer_params: Some(Box::new(ticket)),
        })
    }

    fn ended(&mut self, side: Side, request: &str, ending: Ending) -> Result<bool, Failed> {
        let underway = self.underway.get_mut(request);
        let underway = underway.ok_or_else(|| format!("{request} is not under way"))?;
        let place = match side {
            Side::Prefill => &mut underway.prefill,
            Side::Decode => &mut underway.decode,
        };
        if let Some(earlier) = place.replace(ending) {
            return Err(format!("{request} has ended twice, first with {earlier:?}").into());
        }
        // The maker has its blocks back; now the ticket goes on, too late.
        if let Some(ticket) = underway.kept.take() {
            self.relay(side, request, ticket)?;
            return Ok(false);
        }
        let (Some(prefill), Some(decode)) = (&underway.prefill, &underway.decode) else {
            return Ok(false);
        };
        let job = &underway.job;
        let wanted = expected(job.mode, job.story);
        if (prefill, decode) != (&wanted.0, &wanted.1) {
            return Err(format!(
                "{job:?}: ended with {prefill:?} at prefill and {decode:?} at decode, not with \
                 {wanted:?}"
            )
            .into());
        }
        self.underway.remove(request);
        Ok(true)
    }

    /// Both engines end when all their memory is back, the one that connected first.
    fn finish(&mut self) -> Result<(), Failed> {
        for side in [Side::Decode, Side::Prefill] {
            let engine = match side {
                Side::Prefill => &mut self.prefill,
                Side::Decode => &mut self.decode,
            };
            engine.order(&Order::Finish)?;
            let (_, Answer::Idle) = self.answer()? else {
                return Err("an engine is not idle".into());
            };
            // Its output has ended when it is gone.
            while let Ok((gone, None)) = self.answers.recv_timeout(LIMIT)
                && gone != side
            {}
            let engine = match side {
                Side::Prefill => &mut self.prefill,
                Side::Decode => &mut self.decode,
            };
            let status = engine.process.wait()?;
            if !status.success() {
                return Err(format!("the {side:?} process: {status}").into());
            }
        }
        Ok(())
    }
}
