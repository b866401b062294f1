//! What both processes need around their engine: its configuration, and one place where the
//! router's orders and the engine's events come in.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use kvxfer::Engine;
use kvxfer::config::{Config, ConfigBuilder};
use kvxfer::event::Event;

use crate::Failed;
use crate::message::{self, Answer, Order};

/// How long a transfer, an expectation or a connection may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// How long a process waits for anything at all to happen.
const SILENCE: Duration = Duration::from_secs(60);

/// The settings of one side, from where an inference engine has them.
pub(crate) fn config(name: &str, role: &str, path: &str) -> Result<Config, Failed> {
    let document = format!(
        r#"{{
            "kv_connector": "KvxferConnector",
            "kv_role": "{role}",
            "engine_id": "{name}",
            "kv_connector_extra_config": {{ "qp_per_transfer": 2, "num_worker_threads": "2" }}
        }}"#
    );
    let mut builder = ConfigBuilder::new();
    builder
        .json(&document, "--kv-transfer-config")?
        .from_process_env()?
        .flag("path", "--path", path)?;
    Ok(builder.build()?)
}

/// One thing to do.
#[derive(Debug)]
pub(crate) enum Input {
    Order(Order),
    Event(Event),
    /// The router is gone.
    Hangup,
}

/// The in-tray.
#[derive(Debug)]
pub(crate) struct Desk {
    inputs: Receiver<Result<Input, Failed>>,
}

impl Desk {
    /// Two threads feed it. An engine with a step loop needs neither: it calls
    /// [`Engine::poll_events`] once a step. docs/waiting.md shows that, and waiting in an event loop.
    pub(crate) fn new(engine: &Engine) -> Self {
        let (sender, inputs) = channel();
        let events = sender.clone();
        message::listen(std::io::stdin(), sender, |order| match order {
            Some(order) => order.map(Input::Order),
            None => Ok(Input::Hangup),
        });
        let engine = engine.clone();
        std::thread::spawn(move || {
            let mut news = Vec::new();
            loop {
                engine.wait_events(&mut news, Duration::from_secs(1));
                for event in news.drain(..) {
                    if events.send(Ok(Input::Event(event))).is_err() {
                        return;
                    }
                }
            }
        });
        Self { inputs }
    }

    /// The next thing to do. Never waits for ever.
    pub(crate) fn next(&self) -> Result<Input, Failed> {
        match self.inputs.recv_timeout(SILENCE) {
            Ok(input) => input,
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("nothing has happened for {SILENCE:?}").into())
            }
            Err(RecvTimeoutError::Disconnected) => Ok(Input::Hangup),
        }
    }
}

/// Tells the router.
pub(crate) fn tell(answer: &Answer) -> Result<(), Failed> {
    message::say(&mut std::io::stdout().lock(), answer)
}
