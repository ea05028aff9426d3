//! Memory for 8-bit pixels that a thread uses again.
//!
//! An image passes through buffers of a megabyte or so that live for a few milliseconds. The allocator
//! gives such memory back to the system each time, and to get it again, page by page, takes about as
//! long as to resize the image.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Bytes that a thread keeps, at most: several times what a usual image needs.
const MOST_SPARE: usize = 8 << 20;
/// Smaller buffers come back from the allocator's own lists.
const WORTH_KEEPING: usize = 64 << 10;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// The bytes of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PixelBuffer(Vec<u8>);

impl PixelBuffer {
    /// So many zeros.
    pub fn zeroed(length: usize) -> Self {
        let found = SPARE.with_borrow_mut(|spare| {
            let fits = |spare: &Vec<u8>| length >= WORTH_KEEPING && spare.capacity() >= length;
            let index = spare.iter().position(fits)?;
            Some(spare.swap_remove(index))
        });
        let Some(mut bytes) = found else { return Self(vec![0; length]) };
        bytes.clear();
        bytes.resize(length, 0);
        Self(bytes)
    }
}

impl Drop for PixelBuffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.0);
        if bytes.capacity() < WORTH_KEEPING {
            return;
        }
        // The thread itself may be ending.
        let _ = SPARE.try_with(|spare| {
            let Ok(mut spare) = spare.try_borrow_mut() else { return };
            let kept: usize = spare.iter().map(Vec::capacity).sum();
            if kept + bytes.capacity() <= MOST_SPARE {
                spare.push(bytes);
            }
        });
    }
}

impl From<Vec<u8>> for PixelBuffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl Deref for PixelBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for PixelBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spare() -> Vec<usize> {
        SPARE.with_borrow(|spare| spare.iter().map(Vec::capacity).collect())
    }

    #[test]
    fn buffers_come_back_as_zeros_and_only_so_many_are_kept() {
        let mut first = PixelBuffer::zeroed(2 * WORTH_KEEPING);
        first.fill(7);
        let place = first.as_ptr();
        drop(first);
        let second = PixelBuffer::zeroed(WORTH_KEEPING);
        assert_eq!((second.as_ptr(), second.len()), (place, WORTH_KEEPING));
        assert!(second.iter().all(|byte| *byte == 0));
        drop((second, PixelBuffer::zeroed(8)));
        assert_eq!(spare(), [2 * WORTH_KEEPING]);
        let many: Vec<PixelBuffer> = (0..20).map(|_| PixelBuffer::zeroed(1 << 20)).collect();
        drop((many, PixelBuffer::zeroed(MOST_SPARE + 1)));
        assert_eq!(spare().len(), 8, "7 MiB beside the first");
    }
}
