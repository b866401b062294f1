//! The shared secret: held so that it is never printed, loaded from a file.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most bytes a secret may have.
const MAX_SECRET: u64 = 4096;
/// Below this a secret can be guessed offline from one recorded handshake.
const SHORT_SECRET: usize = 16;

/// A secret shared by the engines that may meet. Never printed; overwritten when the last clone goes.
#[derive(Clone)]
pub struct Secret(Arc<SecretBytes>);

struct SecretBytes(Vec<u8>);

impl Drop for SecretBytes {
    fn drop(&mut self) {
        self.0.fill(0);
        // Without a reader the compiler may drop the store.
        std::hint::black_box(&self.0);
    }
}

impl Secret {
    /// A secret from bytes that the caller got elsewhere.
    ///
    /// # Errors
    ///
    /// [`SecretError::Empty`] or [`SecretError::TooLong`].
    pub fn new(bytes: Vec<u8>) -> Result<Secret, SecretError> {
        let bytes = SecretBytes(bytes);
        if bytes.0.is_empty() {
            return Err(SecretError::Empty { path: None });
        }
        if bytes.0.len() as u64 > MAX_SECRET {
            return Err(SecretError::TooLong {
                path: None,
                max: MAX_SECRET,
            });
        }
        Ok(Secret(Arc::new(bytes)))
    }

    /// Reads a secret from `path`; one line ending at the end (`\n` or `\r\n`) is not part of it.
    ///
    /// # Errors
    ///
    /// The file cannot be read, holds nothing, or holds more than 4096 bytes.
    pub fn from_file(path: impl AsRef<Path>) -> Result<LoadedSecret, SecretError> {
        let path = path.as_ref();
        let io = |action: &'static str| {
            let path = path.to_path_buf();
            move |source: io::Error| SecretError::Io {
                action,
                path,
                kind: source.kind(),
                source: Arc::new(source),
            }
        };
        let file = File::open(path).map_err(io("open"))?;
        let mode = file.metadata().map_err(io("stat"))?.permissions().mode() & 0o777;
        // Room for the longest secret at once: a growing buffer would leave copies behind.
        let mut bytes = SecretBytes(Vec::with_capacity(MAX_SECRET as usize + 4));
        file.take(MAX_SECRET + 3)
            .read_to_end(&mut bytes.0)
            .map_err(io("read"))?;
        if bytes.0.last() == Some(&b'\n') {
            bytes.0.pop();
            if bytes.0.last() == Some(&b'\r') {
                bytes.0.pop();
            }
        }
        if bytes.0.is_empty() {
            return Err(SecretError::Empty {
                path: Some(path.to_path_buf()),
            });
        }
        if bytes.0.len() as u64 > MAX_SECRET {
            return Err(SecretError::TooLong {
                path: Some(path.to_path_buf()),
                max: MAX_SECRET,
            });
        }
        let mut warnings = Vec::new();
        if mode & 0o004 != 0 {
            warnings.push(SecretWarning::WorldReadable {
                path: path.to_path_buf(),
                mode,
            });
        }
        if bytes.0.len() < SHORT_SECRET {
            warnings.push(SecretWarning::Short {
                path: path.to_path_buf(),
                len: bytes.0.len(),
            });
        }
        Ok(LoadedSecret {
            secret: Secret(Arc::new(bytes)),
            warnings,
        })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A secret and what its owner should hear about its file.
#[derive(Debug, Clone)]
pub struct LoadedSecret {
    /// The secret.
    pub secret: Secret,
    /// Weaknesses that do not stop it from being used.
    pub warnings: Vec<SecretWarning>,
}

/// A weakness of a secret file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SecretWarning {
    /// Every user of the host can read it.
    #[error("{} is readable by everybody (mode {mode:03o}); chmod 600 it", path.display())]
    WorldReadable {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// So short that it can be guessed from a recorded handshake.
    #[error("the secret in {} has only {len} bytes; use 32 random ones (openssl rand -hex 32)", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Bytes of the secret.
        len: usize,
    },
}

/// Why a secret cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The file cannot be read.
    #[error("cannot {action} secret file {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kind of error, to match on.
        kind: io::ErrorKind,
        /// The system's words.
        source: Arc<io::Error>,
    },
    /// There is nothing in it.
    #[error("secret is empty{}; write one with: openssl rand -hex 32", of(path))]
    Empty {
        /// The file, if it came from one.
        path: Option<PathBuf>,
    },
    /// It is longer than any secret.
    #[error(
        "secret is longer than {max} bytes{}; is this the right file?",
        of(path)
    )]
    TooLong {
        /// The file, if it came from one.
        path: Option<PathBuf>,
        /// The limit.
        max: u64,
    },
}

fn of(path: &Option<PathBuf>) -> String {
    path.as_ref()
        .map(|p| format!(" in {}", p.display()))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn temp(name: &str, content: &[u8], mode: u32) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("kvxfer-secret-{}-{name}", std::process::id()));
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn one_line_ending_is_trimmed_and_warnings_are_given() {
        let long = b"0123456789abcdef0123456789abcdef";
        let path = temp("a", &[long.as_slice(), b"\r\n"].concat(), 0o600);
        let loaded = Secret::from_file(&path).unwrap();
        assert_eq!(loaded.secret.bytes(), long);
        assert!(loaded.warnings.is_empty());
        fs::remove_file(&path).unwrap();

        let path = temp("b", b"abc\n\n", 0o644);
        let loaded = Secret::from_file(&path).unwrap();
        assert_eq!(loaded.secret.bytes(), b"abc\n");
        assert!(matches!(
            loaded.warnings.as_slice(),
            [
                SecretWarning::WorldReadable { mode: 0o644, .. },
                SecretWarning::Short { len: 4, .. }
            ]
        ));
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn empty_missing_and_huge_files_are_refused() {
        for content in [b"".as_slice(), b"\n", b"\r\n"] {
            let path = temp("c", content, 0o600);
            assert!(matches!(
                Secret::from_file(&path),
                Err(SecretError::Empty { path: Some(_) })
            ));
            fs::remove_file(&path).unwrap();
        }
        let path = temp("d", &[b'x'; MAX_SECRET as usize + 1], 0o600);
        assert!(matches!(
            Secret::from_file(&path),
            Err(SecretError::TooLong { .. })
        ));
        fs::write(
            &path,
            [[b'x'; MAX_SECRET as usize].as_slice(), b"\r\n"].concat(),
        )
        .unwrap();
        assert_eq!(
            Secret::from_file(&path).unwrap().secret.bytes().len(),
            MAX_SECRET as usize
        );
        fs::remove_file(&path).unwrap();
        let gone = Secret::from_file("/nonexistent/secret").unwrap_err();
        assert!(matches!(
            gone,
            SecretError::Io {
                kind: io::ErrorKind::NotFound,
                ..
            }
        ));
        assert_eq!(
            gone.to_string(),
            "cannot open secret file /nonexistent/secret"
        );
    }

    #[test]
    fn a_secret_does_not_print_itself() {
        let secret = Secret::new(b"hunter2hunter2hunter2".to_vec()).unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert!(matches!(
            Secret::new(Vec::new()),
            Err(SecretError::Empty { path: None })
        ));
    }
}
