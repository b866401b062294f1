//! What names a layout on the command line, and the layout that it names.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use kvxfer::ids::Rank;
use kvxfer::layout::models::{self, NAMES};
use kvxfer::layout::{
    HfOptions, KvFormat, KvPlacement, LayerWindow, LayoutError, Packing, PlacementDesc, Topology,
};

use super::args::{Ask, Shape, dtype};
use super::live;
use crate::problem::Problem;

/// The schema of `layout show --json`, which is a layout file too.
pub(super) const SCHEMA: &str = "kvxfer.layout/1";

/// The longest file that is read.
const LONGEST: u64 = 64 << 20;

/// The layout of one rank, as a layout file holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layout {
    pub(crate) format: KvFormat,
    pub(crate) topology: Topology,
}

impl Layout {
    /// What `text` names, with the options that are part of it and those beside it, which come first.
    /// A live engine is asked.
    pub(super) fn of(text: &str, beside: &Shape, ask: &Ask) -> Result<Self, Problem> {
        let (name, mut shape) = split(text)?;
        shape.put(beside);
        if !live::is_address(name) {
            return Self::named(name, &shape);
        }
        if shape != Shape::default() {
            let cause = format!("{name} is a live engine, which says all of it itself");
            return Err(Problem::usage(cause).with_fix("leave the options out"));
        }
        live::layout(name, ask)
    }

    /// What a name or a file says, and what `shape` adds to it.
    pub(super) fn named(name: &str, shape: &Shape) -> Result<Self, Problem> {
        let bad = |error| refused(name, error);
        if let Some(config) = models::config(name) {
            let format = KvFormat::from_hf_config(config, &shape.options()).map_err(bad)?;
            return shape.layout(format).map_err(bad);
        }
        let file: Value = read(name)?;
        match file.get("schema") {
            None => {
                let format = KvFormat::from_hf_value(&file, &shape.options()).map_err(bad)?;
                shape.layout(format).map_err(bad)
            }
            Some(schema) if schema == SCHEMA => {
                if *shape != Shape::default() {
                    let cause = format!("{name} is a layout file, which says all of it itself");
                    return Err(Problem::usage(cause)
                        .with_fix("leave the options out, or name the model's config.json"));
                }
                Self::from_file(name, &file)
            }
            Some(schema) => {
                let cause = format!("{name} has the schema {schema}, which is no layout");
                Err(Problem::usage(cause).with_fix(format!(
                    "make a layout file with `kvxfer layout show … --json`: its schema is {SCHEMA}"
                )))
            }
        }
    }

    fn from_file(name: &str, file: &Value) -> Result<Self, Problem> {
        let layout = file.get("layout").unwrap_or(&Value::Null);
        let layout = Self::deserialize(layout).map_err(|error| {
            Problem::usage(format!("{name} is no layout file"))
                .with_evidence(format!("layout: {error}"))
                .with_fix("make it anew with `kvxfer layout show … --json`")
        })?;
        // A rank outside its size, or layers that are not there.
        layout.placed().map_err(|error| refused(name, error))?;
        Ok(layout)
    }

    /// The same layout, as if one rank had all of it: what is left is the format.
    pub(super) fn whole(&self) -> Self {
        Self {
            format: self.format.clone(),
            topology: Topology::single(&self.format),
        }
    }

    /// The first rank of another pipeline stage.
    pub(super) fn rank(&self, pp: u32) -> Self {
        let Topology {
            tp, pp: stages, dp, ..
        } = self.topology;
        let topology = Topology {
            rank: Rank { dp: 0, pp, tp: 0 },
            tp,
            pp: stages,
            dp,
            layers: LayerWindow::even(self.format.layers(), pp, stages),
        };
        Self {
            format: self.format.clone(),
            topology,
        }
    }

    /// Dense, with one block in each group.
    pub(super) fn placed(&self) -> Result<PlacementDesc, LayoutError> {
        self.placed_with(1)
    }

    /// Dense, with so many blocks in each group.
    pub(super) fn placed_with(&self, blocks: u32) -> Result<PlacementDesc, LayoutError> {
        let blocks = vec![blocks; self.format.groups().len()];
        let (topology, packing) = (self.topology, Packing::PerTensor);
        let placed = KvPlacement::uniform(&self.format, topology, &blocks, packing, 1)?;
        placed.describe(&self.format)
    }
}

impl Shape {
    /// Takes what `over` gives.
    fn put(&mut self, over: &Self) {
        let Self {
            tp,
            pp,
            tp_rank,
            pp_rank,
            block_size,
            dtype,
            mtp,
            one_table,
            model_id,
            revision,
        } = over;
        self.tp = tp.or(self.tp);
        self.pp = pp.or(self.pp);
        self.tp_rank = tp_rank.or(self.tp_rank);
        self.pp_rank = pp_rank.or(self.pp_rank);
        self.block_size = block_size.or(self.block_size);
        self.dtype = dtype.or(self.dtype);
        self.mtp |= mtp;
        self.one_table |= one_table;
        self.model_id = model_id.clone().or(self.model_id.take());
        self.revision = revision.clone().or(self.revision.take());
    }

    /// Takes one option as it is written after a colon.
    fn set(&mut self, option: &str) -> Result<(), String> {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option, None),
        };
        let number = |least: u32| {
            let number = value.and_then(|v| v.parse::<u32>().ok());
            let number = number.filter(|n| *n >= least);
            let said = || format!("`{option}`: say {key}=N, a whole number of at least {least}");
            number.map(Some).ok_or_else(said)
        };
        let word = || match value {
            Some(value) if !value.is_empty() => Ok(Some(value.to_owned())),
            _ => Err(format!("`{option}`: say {key}=WORD")),
        };
        let flag = || match value {
            None => Ok(true),
            Some(_) => Err(format!("`{option}`: {key} takes no value")),
        };
        match key {
            "tp" => self.tp = number(1)?,
            "pp" => self.pp = number(1)?,
            "tp-rank" => self.tp_rank = number(0)?,
            "pp-rank" => self.pp_rank = number(0)?,
            "block-size" => self.block_size = number(1)?,
            "dtype" => self.dtype = Some(dtype(value.unwrap_or_default())?),
            "mtp" => self.mtp = flag()?,
            "one-table" => self.one_table = flag()?,
            "model-id" => self.model_id = word()?,
            "revision" => self.revision = word()?,
            _ => {
                return Err(format!(
                    "`{key}` is no option of a layout: there are {}",
                    KEYS.join(", ")
                ));
            }
        }
        Ok(())
    }

    fn options(&self) -> HfOptions {
        let default = HfOptions::default();
        HfOptions {
            block_tokens: self.block_size.unwrap_or(default.block_tokens),
            dtype: self.dtype,
            mtp: self.mtp,
            one_table: self.one_table,
            model_id: self.model_id.clone(),
            revision: self.revision.clone(),
        }
    }

    fn layout(&self, format: KvFormat) -> Result<Layout, LayoutError> {
        let (tp, pp) = (self.tp.unwrap_or(1), self.pp.unwrap_or(1));
        let rank = Rank {
            dp: 0,
            pp: self.pp_rank.unwrap_or(0),
            tp: self.tp_rank.unwrap_or(0),
        };
        let topology = Topology {
            rank,
            tp,
            pp,
            dp: 1,
            layers: LayerWindow::even(format.layers(), rank.pp, pp),
        };
        let layout = Layout { format, topology };
        // Whether all of it comes out even, down to the last stage.
        layout.placed()?;
        layout.rank(pp.saturating_sub(1)).placed()?;
        Ok(layout)
    }
}

const KEYS: [&str; 10] = [
    "tp",
    "pp",
    "tp-rank",
    "pp-rank",
    "block-size",
    "dtype",
    "mtp",
    "one-table",
    "model-id",
    "revision",
];

/// A name, and the options after its last colon. What is a file as a whole has none.
fn split(text: &str) -> Result<(&str, Shape), Problem> {
    let is_option = |item: &str| item.contains('=') || KEYS.contains(&item);
    let options = text
        .rsplit_once(':')
        .filter(|(_, options)| options.split(',').all(is_option))
        .filter(|_| !Path::new(text).exists());
    let Some((name, options)) = options else {
        return Ok((text, Shape::default()));
    };
    let mut shape = Shape::default();
    for option in options.split(',') {
        let bad = |why| Problem::usage(format!("{text}: {why}"));
        shape.set(option).map_err(bad)?;
    }
    Ok((name, shape))
}

/// A file of JSON, or the config.json of a folder.
fn read(name: &str) -> Result<Value, Problem> {
    let mut path = Path::new(name).to_path_buf();
    if path.is_dir() {
        path.push("config.json");
    }
    let shown = path.display();
    let unread = |error: std::io::Error| {
        let problem =
            Problem::usage(format!("{shown} cannot be read")).with_evidence(error.to_string());
        match error.kind() {
            std::io::ErrorKind::NotFound => problem.with_fix(match meant(name) {
                Some(known) => format!("say {known}, if that is the model"),
                None => format!(
                    "name a config.json, the folder of one, a live engine's HOST:PORT, or a built-in model: {}",
                    NAMES.join(", ")
                ),
            }),
            _ => problem,
        }
    };
    let mut text = Vec::new();
    let file = File::open(&path).map_err(unread)?;
    file.take(LONGEST + 1)
        .read_to_end(&mut text)
        .map_err(unread)?;
    if text.len() as u64 > LONGEST {
        return Err(Problem::usage(format!(
            "{shown} is longer than {} MiB: it is no config.json",
            LONGEST >> 20
        )));
    }
    serde_json::from_slice(&text).map_err(|error| {
        Problem::usage(format!("{shown} is no JSON")).with_evidence(error.to_string())
    })
}

/// What is wrong with a layout, to whoever asked for it.
fn refused(name: &str, error: LayoutError) -> Problem {
    let mut problem = crate::explain::library(&error.into());
    problem.cause = format!("{name}: {}", problem.cause);
    problem
}

/// The built-in model that was probably meant.
fn meant(name: &str) -> Option<&'static str> {
    let near = NAMES.map(|known| (strsim::jaro(name, known), known));
    let nearest = near.into_iter().max_by(|a, b| a.0.total_cmp(&b.0));
    nearest
        .filter(|(how, _)| *how > ALIKE)
        .map(|(_, known)| known)
}

/// How alike two names are that are taken for one (Jaro, 0 to 1).
const ALIKE: f64 = 0.85;

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(text: &str) -> Result<Shape, String> {
        split(text).map(|s| s.1).map_err(|problem| problem.cause)
    }

    #[test]
    fn options_stand_after_the_last_colon() {
        let wanted = Shape {
            tp: Some(4),
            block_size: Some(32),
            dtype: Some(kvxfer::layout::DType::F8E4m3),
            mtp: true,
            model_id: Some("a/b".to_owned()),
            ..Shape::default()
        };
        let text = "x:tp=4,block-size=32,dtype=fp8,mtp,model-id=a/b";
        assert_eq!(split(text), Ok(("x", wanted)));
        let plain = |text| split(text).map(|s| s == (text, Shape::default()));
        assert_eq!(plain("x"), Ok(true));
        assert_eq!(plain("dir:more/config.json"), Ok(true), "no options");
        assert_eq!(split("host:1:pp=2").map(|s| s.0), Ok("host:1"));
    }

    #[test]
    fn bad_options_are_named() {
        for (text, word) in [
            ("x:tp=0", "at least 1"),
            ("x:tp=", "say tp=N"),
            ("x:tp=4,ranks=3", "`ranks` is no option"),
            ("x:dtype=fp7", "`fp7` is no type"),
            ("x:mtp=1", "mtp takes no value"),
            ("x:revision=", "say revision=WORD"),
            ("x:tp=99999999999", "say tp=N"),
        ] {
            let error = shape(text).expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_layout_comes_back_from_its_file() {
        let shape = Shape {
            tp: Some(4),
            pp: Some(2),
            pp_rank: Some(1),
            ..Shape::default()
        };
        let layout = Layout::named("llama-3.1-70b", &shape).expect("built in");
        assert_eq!(layout.topology.layers.first, 40);
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("a.json");
        let file = serde_json::json!({"schema": SCHEMA, "layout": layout});
        std::fs::write(&path, file.to_string()).expect("written");
        let name = path.to_str().expect("text");
        let again = Layout::named(name, &Shape::default()).expect("a layout file");
        assert_eq!(again, layout);
        let error = Layout::named(name, &shape).expect_err("it says so itself");
        assert!(error.cause.contains("says all of it itself"), "{error}");
    }
}
