//! Results: one line of JSON, a table for people, or CSV. All three show the same rows.

mod csv;
pub(crate) mod schema;
mod table;

use std::io::{self, Write};

use schema::BwReport;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Table,
    Json,
    Csv,
}

/// Prints a report. Standard output that was closed early (`| head`) is no failure.
///
/// # Errors
///
/// Any other failure to write.
pub(crate) fn print(report: &BwReport, format: Format, mut to: impl Write) -> io::Result<()> {
    let text = match format {
        Format::Table => table::text(report),
        Format::Csv => csv::text(&report.rows),
        Format::Json => {
            let mut line = serde_json::to_string(report)?;
            line.push('\n');
            line
        }
    };
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests;
