//! Bytes that start on a cache line: a vector load never straddles two lines.

/// Bytes of a cache line and of the widest vector.
const LINE: usize = 64;

/// A growable buffer of bytes at an aligned address.
#[derive(Debug, Default)]
pub(super) struct AlignedBytes {
    storage: Vec<u8>,
    len: usize,
}

impl AlignedBytes {
    /// `len` zeros.
    pub(super) fn zeroed(len: usize) -> Self {
        Self { storage: vec![0; len + LINE], len }
    }

    /// Makes it `len` bytes long; what it holds then is unspecified.
    pub(super) fn resize(&mut self, len: usize) {
        if self.storage.len() < len + LINE {
            self.storage = vec![0; len + LINE];
        }
        self.len = len;
    }

    /// The bytes.
    pub(super) fn as_slice(&self) -> &[u8] {
        let start = self.storage.as_ptr().align_offset(LINE).min(LINE);
        &self.storage[start..start + self.len]
    }

    /// The bytes, to change.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        let start = self.storage.as_ptr().align_offset(LINE).min(LINE);
        &mut self.storage[start..start + self.len]
    }
}
