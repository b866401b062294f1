//! Which pages memory really has, as the kernel tells it.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::ops::Range;

use nix::errno::Errno;

/// What kind of pages memory has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageBacking {
    /// Reserved huge pages (`/proc/sys/vm/nr_hugepages`).
    HugeTlb,
    /// Transparent huge pages, for all that has pages at all.
    Transparent,
    /// Transparent huge pages for a part only.
    PartlyTransparent,
    /// Ordinary pages.
    Ordinary,
}

/// Why memory has no better pages.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhyNotHuge {
    /// They were not asked for.
    NotAsked,
    /// The memory is smaller than a huge page.
    Small {
        /// Its length in bytes.
        len: u64,
    },
    /// Too few reserved huge pages are free.
    FewReserved {
        /// Pages needed.
        needed: u64,
        /// Pages free.
        free: u64,
    },
    /// Enough reserved huge pages seemed free, but the kernel did not give them.
    ReservedRefused {
        /// The kernel's answer.
        errno: Errno,
    },
    /// The kernel would not collapse the memory's pages to huge ones.
    CollapseRefused {
        /// The kernel's answer.
        errno: Errno,
    },
    /// No page has been touched yet, so none exists.
    Untouched,
    /// A system setting.
    Setting {
        /// The setting's file.
        path: &'static str,
        /// What it holds, the choice in force in brackets.
        value: String,
    },
    /// The kernel's account of this process could not be read.
    Unreadable {
        /// The file.
        path: &'static str,
        /// The kernel's answer; none if the memory was not found in it.
        errno: Option<Errno>,
    },
}

/// The pages of a memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageInfo {
    /// The size in bytes of most of its pages.
    pub size: u64,
    /// What kind they are.
    pub how: PageBacking,
    /// Bytes that have a page now.
    pub resident_bytes: u64,
    /// Bytes of these in huge pages.
    pub huge_bytes: u64,
    /// Why they are not better; empty when they are reserved huge pages.
    pub why_not: Vec<WhyNotHuge>,
}

impl fmt::Display for PageBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HugeTlb => "reserved huge",
            Self::Transparent => "transparent huge",
            Self::PartlyTransparent => "partly transparent huge",
            Self::Ordinary => "ordinary",
        })
    }
}

impl fmt::Display for WhyNotHuge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAsked => f.write_str("huge pages were not asked for"),
            Self::Small { len } => write!(f, "{len} bytes are less than a huge page"),
            Self::FewReserved { needed, free } => write!(
                f,
                "{free} reserved huge pages are free and {needed} needed (vm.nr_hugepages)"
            ),
            Self::ReservedRefused { errno } => write!(f, "reserved huge pages: {errno}"),
            Self::CollapseRefused { errno } => write!(f, "collapsing to huge pages: {errno}"),
            Self::Untouched => f.write_str("no page has been touched yet"),
            Self::Setting { path, value } => write!(f, "{path} is \"{value}\""),
            Self::Unreadable {
                path,
                errno: Some(errno),
            } => write!(f, "{path}: {errno}"),
            Self::Unreadable { path, errno: None } => write!(f, "{path} does not list this memory"),
        }
    }
}

impl fmt::Display for PageInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages of {} KiB", self.how, self.size >> 10)?;
        for (i, why) in self.why_not.iter().enumerate() {
            write!(f, "{} {why}", if i == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

const SMAPS: &str = "/proc/self/smaps";
const MIB2: u64 = 2 << 20;

/// What the kernel says of an address range of this process.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Account {
    found: bool,
    page_size: u64,
    resident: u64,
    huge: u64,
    hugetlb: u64,
}

/// Looks a mapping up. `shared` says which system setting governs it; `earlier` is what was learned
/// when it was made.
pub(crate) fn look_up(range: Range<u64>, shared: bool, earlier: &[WhyNotHuge]) -> PageInfo {
    let mut why_not = earlier.to_vec();
    let account = match std::fs::File::open(SMAPS) {
        Ok(file) => account(BufReader::new(file), &range),
        Err(e) => Err(e),
    };
    let account = account.unwrap_or_else(|e| {
        let errno = e.raw_os_error().map(Errno::from_raw);
        why_not.push(WhyNotHuge::Unreadable { path: SMAPS, errno });
        Account {
            found: true,
            ..Account::default()
        }
    });
    if !account.found {
        why_not.push(WhyNotHuge::Unreadable {
            path: SMAPS,
            errno: None,
        });
    }
    let ordinary = ordinary_page_size();
    if account.page_size > ordinary {
        return PageInfo {
            size: account.page_size,
            how: PageBacking::HugeTlb,
            resident_bytes: account.hugetlb,
            huge_bytes: account.hugetlb,
            why_not: Vec::new(),
        };
    }
    let (size, how) = match account.huge {
        0 => (ordinary, PageBacking::Ordinary),
        huge if huge >= account.resident => (MIB2, PageBacking::Transparent),
        huge if 2 * huge >= account.resident => (MIB2, PageBacking::PartlyTransparent),
        _ => (ordinary, PageBacking::PartlyTransparent),
    };
    if account.found && account.resident == 0 {
        why_not.push(WhyNotHuge::Untouched);
    }
    let asked = !why_not.contains(&WhyNotHuge::NotAsked);
    if how != PageBacking::Transparent && asked {
        why_not.extend(setting(shared));
    }
    PageInfo {
        size,
        how,
        resident_bytes: account.resident,
        huge_bytes: account.huge,
        why_not,
    }
}

/// The system setting, where it is one that keeps huge pages away.
fn setting(shared: bool) -> Option<WhyNotHuge> {
    let path = if shared {
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    } else {
        "/sys/kernel/mm/transparent_hugepage/enabled"
    };
    match std::fs::read_to_string(path) {
        Ok(value) => {
            let off = value.contains("[never]") || value.contains("[deny]");
            off.then(|| WhyNotHuge::Setting {
                path,
                value: value.trim().to_owned(),
            })
        }
        Err(e) => Some(WhyNotHuge::Unreadable {
            path,
            errno: e.raw_os_error().map(Errno::from_raw),
        }),
    }
}

/// Reserved huge pages of 2 MiB that are free and not promised to anybody.
pub(crate) fn reserved_free() -> u64 {
    let read = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        let text = std::fs::read_to_string(path).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let free = read("free_hugepages").unwrap_or(0);
    free.saturating_sub(read("resv_hugepages").unwrap_or(0))
}

pub(crate) fn ordinary_page_size() -> u64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096)
}

/// The whole pages that spans (first byte, bytes) lie in, in their order. Those that share a page are one.
pub(crate) fn whole(spans: impl IntoIterator<Item = (u64, u64)>) -> Vec<Range<u64>> {
    let page = ordinary_page_size();
    let end = |(at, len): (u64, u64)| {
        let end = at.saturating_add(len);
        end.checked_next_multiple_of(page).unwrap_or(end)
    };
    let mut spans: Vec<(u64, u64)> = spans.into_iter().collect();
    spans.sort_unstable();
    let mut pages: Vec<Range<u64>> = Vec::new();
    for span in spans {
        let (start, end) = (span.0 - span.0 % page, end(span));
        match pages.last_mut() {
            Some(last) if start < last.end => last.end = last.end.max(end),
            _ => pages.push(start..end),
        }
    }
    pages
}

/// Sums up the smaps entries that lie in the range.
fn account(smaps: impl BufRead, range: &Range<u64>) -> std::io::Result<Account> {
    let mut sum = Account::default();
    let mut inside = false;
    for line in smaps.lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some(key) = first.strip_suffix(':') {
            if !inside {
                continue;
            }
            let kib = words
                .next()
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(0);
            let bytes = kib.saturating_mul(1024);
            match key {
                "KernelPageSize" => sum.page_size = sum.page_size.max(bytes),
                "Rss" => sum.resident += bytes,
                "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => sum.huge += bytes,
                "Shared_Hugetlb" | "Private_Hugetlb" => sum.hugetlb += bytes,
                _ => {}
            }
        } else {
            inside = parse_range(first).is_some_and(|v| v.start < range.end && range.start < v.end);
            sum.found |= inside;
        }
    }
    Ok(sum)
}

fn parse_range(text: &str) -> Option<Range<u64>> {
    let (start, end) = text.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
7f0000000000-7f0000400000 rw-s 00000000 00:01 7    /memfd:kvxfer (deleted)
Size:               4096 kB
KernelPageSize:        4 kB
Rss:                4096 kB
ShmemPmdMapped:     2048 kB
VmFlags: rd wr sh
7f0000400000-7f0000600000 rw-p 00000000 00:00 0
KernelPageSize:     2048 kB
Private_Hugetlb:    2048 kB
";

    #[test]
    fn an_account_takes_only_the_entries_of_the_range() {
        let first = account(TEXT.as_bytes(), &(0x7f00_0000_0000..0x7f00_0040_0000));
        let wanted = Account {
            found: true,
            page_size: 4096,
            resident: 4 << 20,
            huge: 2 << 20,
            hugetlb: 0,
        };
        assert_eq!(first.ok(), Some(wanted));
        let second = account(TEXT.as_bytes(), &(0x7f00_0040_0000..0x7f00_0060_0000));
        assert_eq!(second.map(|a| a.hugetlb).ok(), Some(2 << 20));
        let none = account(TEXT.as_bytes(), &(0x1000..0x2000));
        assert_eq!(none.ok(), Some(Account::default()));
    }

    #[test]
    fn garbage_in_smaps_is_no_panic() {
        let text = "zz-\n:\nRss: x kB\n7f-80 rw\nRss: 99999999999999999999 kB\nRss:";
        assert_eq!(
            account(text.as_bytes(), &(0x7f..0x80))
                .map(|a| a.resident)
                .ok(),
            Some(0)
        );
    }
}
