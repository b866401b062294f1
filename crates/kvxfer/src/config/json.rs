//! A JSON reader that knows where everything stands and keeps every member of an object.
//!
//! `serde_json` gives neither the line of a value nor a key that occurs twice, and a configuration
//! error should name both. It does decode the strings here.

use super::error::ConfigError;

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 32;

/// A value and where it begins.
#[derive(Debug)]
pub(super) struct Node {
    /// Bytes from the start of the text.
    pub(super) offset: usize,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    /// As written.
    Number(String),
    String(String),
    Array(Vec<Node>),
    /// In the order of the text, names that occur twice included.
    Object(Vec<(String, Node)>),
}

/// Reads a whole document.
///
/// # Errors
/// It is not JSON; `origin` names it in the error.
pub(super) fn read(text: &str, origin: &str) -> Result<Node, ConfigError> {
    let mut reader = Reader {
        text,
        at: 0,
        path: Vec::new(),
    };
    let result = reader.value().and_then(|node| {
        reader.skip_space();
        if reader.at < text.len() {
            Err("the end of the document")
        } else {
            Ok(node)
        }
    });
    result.map_err(|expected| {
        let (line, column) = line_column(text, reader.at);
        ConfigError::Syntax {
            origin: origin.into(),
            path: reader.path(),
            line,
            column,
            expected,
        }
    })
}

/// Line and column of a byte, both from 1.
pub(super) fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line_start = before
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    (
        before.iter().filter(|b| **b == b'\n').count() + 1,
        before.len() - line_start + 1,
    )
}

enum Step {
    Key(String),
    Index(usize),
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// The way to the value being read; on an error it stays as it was there.
    path: Vec<Step>,
}

/// What was expected instead.
type Parsed<T> = Result<T, &'static str>;

impl Reader<'_> {
    fn path(&self) -> String {
        let mut out = String::new();
        for step in &self.path {
            match step {
                Step::Key(key) => {
                    if !out.is_empty() {
                        out.push('.');
                    }
                    out.push_str(key);
                }
                Step::Index(index) => out.push_str(&format!("[{index}]")),
            }
        }
        out
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self) -> Parsed<Node> {
        self.skip_space();
        if self.path.len() > MAX_DEPTH {
            return Err("less nesting");
        }
        let offset = self.at;
        let value = match self.peek() {
            Some(b'{') => self.object()?,
            Some(b'[') => self.array()?,
            Some(b'"') => Value::String(self.string()?),
            Some(b'-' | b'0'..=b'9') => self.number()?,
            _ => self.literal()?,
        };
        Ok(Node { offset, value })
    }

    fn object(&mut self) -> Parsed<Value> {
        self.at += 1;
        let mut members = Vec::new();
        if self.take(b'}') {
            return Ok(Value::Object(members));
        }
        loop {
            self.skip_space();
            if self.peek() != Some(b'"') {
                return Err("a key in double quotes");
            }
            let key = self.string()?;
            self.path.push(Step::Key(key.clone()));
            if !self.take(b':') {
                return Err("`:`");
            }
            let node = self.value()?;
            self.path.pop();
            members.push((key, node));
            if self.take(b'}') {
                return Ok(Value::Object(members));
            }
            if !self.take(b',') {
                return Err("`,` or `}`");
            }
        }
    }

    fn array(&mut self) -> Parsed<Value> {
        self.at += 1;
        let mut items = Vec::new();
        if self.take(b']') {
            return Ok(Value::Array(items));
        }
        loop {
            self.path.push(Step::Index(items.len()));
            items.push(self.value()?);
            self.path.pop();
            if self.take(b']') {
                return Ok(Value::Array(items));
            }
            if !self.take(b',') {
                return Err("`,` or `]`");
            }
        }
    }

    fn string(&mut self) -> Parsed<String> {
        let bytes = self.text.as_bytes();
        let mut end = self.at + 1;
        loop {
            match bytes.get(end) {
                Some(b'"') => break,
                Some(b'\\') => end += 2,
                Some(_) => end += 1,
                None => return Err("a string that is closed with a double quote"),
            }
        }
        // Both ends are quotes, so the slice is on character boundaries.
        let quoted = self.text.get(self.at..=end).ok_or("a string")?;
        let string = serde_json::from_str(quoted)
            .map_err(|_| "a string without control characters or unknown escapes")?;
        self.at = end + 1;
        Ok(string)
    }

    fn number(&mut self) -> Parsed<Value> {
        let rest = self.text.get(self.at..).ok_or("a number")?;
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && !matches!(c, '-' | '+' | '.' | 'e' | 'E'))
            .unwrap_or(rest.len());
        let number = &rest[..end];
        // Checked for form only; each setting reads it in its own way.
        serde_json::from_str::<serde_json::Number>(number).map_err(|_| "a number")?;
        self.at += end;
        Ok(Value::Number(number.into()))
    }

    fn literal(&mut self) -> Parsed<Value> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        for (word, value) in [
            ("true", Value::Bool(true)),
            ("false", Value::Bool(false)),
            ("null", Value::Null),
        ] {
            if rest.starts_with(word) {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err("a value")
    }
}
