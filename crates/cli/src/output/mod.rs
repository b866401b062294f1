//! Results: one line of JSON, a table for people, or CSV. All three show the same rows.

mod csv;
pub(crate) mod ping;
pub(crate) mod schema;
mod table;

use schema::BwReport;
use serde::Serialize;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Table,
    Json,
    Csv,
}

/// A report as it is printed, on a terminal of `width` columns if it is one.
///
/// # Errors
///
/// None that its types allow.
pub(crate) fn text(
    report: &BwReport,
    format: Format,
    width: Option<usize>,
) -> Result<String, serde_json::Error> {
    Ok(match format {
        Format::Table => table::text(report, width),
        Format::Csv => csv::text(&report.rows),
        Format::Json => line(report)?,
    })
}

/// A report in one line of JSON.
///
/// # Errors
///
/// None that its types allow.
pub(crate) fn line(report: &impl Serialize) -> Result<String, serde_json::Error> {
    Ok(serde_json::to_string(report)? + "\n")
}

#[cfg(test)]
mod tests;
