//! The product's allocator: large blocks lie in huge pages.
//!
//! A flow table of a million flows is hundreds of megabytes that are read in no order. With pages of 4 KiB nearly every
//! look-up has to walk the page table first, in a virtual machine two of them; with pages of 2 MiB it does not.

use std::alloc::{GlobalAlloc, Layout, System};

/// Size and alignment of a huge page.
const HUGE_BYTES: usize = 2 << 20;

/// The system's allocator, which asks for huge pages where a block holds at least one. The kernel gives them when it has
/// some; otherwise nothing changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct HugePages;

/// The layout that a block really has.
fn real(layout: Layout) -> Layout {
    if layout.size() < HUGE_BYTES {
        return layout;
    }
    // Only fails when size and alignment overflow, and then there is no such block anyway.
    layout.align_to(HUGE_BYTES).unwrap_or(layout)
}

// SAFETY: every call goes to the system's allocator, and a block is given back with the layout it was made with:
// `real` depends on the layout alone, which is the same in both calls. Advice does not change what memory holds.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let real = real(layout);
        // SAFETY: the caller's layout has a size above zero; so has the real one.
        let block = unsafe { System.alloc(real) };
        advise(block, real);
        block
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let real = real(layout);
        // SAFETY: as in `alloc`.
        let block = unsafe { System.alloc_zeroed(real) };
        advise(block, real);
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block was made with this layout.
        unsafe { System.dealloc(block, real(layout)) };
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if layout.size() < HUGE_BYTES && bytes < HUGE_BYTES {
            // SAFETY: both sizes keep the caller's alignment, and the block was made with this layout.
            return unsafe { System.realloc(block, layout, bytes) };
        }
        // SAFETY: the caller vouches that the new size is valid for the alignment.
        let new_layout = unsafe { Layout::from_size_align_unchecked(bytes, layout.align()) };
        // SAFETY: as in `alloc`.
        let new = unsafe { self.alloc(new_layout) };
        if !new.is_null() {
            // SAFETY: both blocks are at least so long, and they are two.
            unsafe { std::ptr::copy_nonoverlapping(block, new, layout.size().min(bytes)) };
            // SAFETY: the caller gives the block up, made with this layout.
            unsafe { self.dealloc(block, layout) };
        }
        new
    }
}

fn advise(block: *mut u8, layout: Layout) {
    if layout.size() >= HUGE_BYTES && !block.is_null() {
        // SAFETY: the range is inside the block. A kernel without huge pages refuses, which does not matter.
        unsafe { libc::madvise(block.cast(), layout.size() & !(HUGE_BYTES - 1), libc::MADV_HUGEPAGE) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn blocks_of_all_sizes_hold_what_is_written() {
        for bytes in [1, 4096, HUGE_BYTES - 1, HUGE_BYTES, 3 * HUGE_BYTES + 5] {
            let layout = Layout::from_size_align(bytes, 16).unwrap();
            // SAFETY: the layout has a size; the block is written and read within it and given back with it.
            unsafe {
                let block = HugePages.alloc(layout);
                assert!(!block.is_null());
                assert!(bytes < HUGE_BYTES || (block as usize).is_multiple_of(HUGE_BYTES));
                block.write_bytes(0x5a, bytes);
                let grown = HugePages.realloc(block, layout, bytes * 2);
                assert_eq!(*grown.add(bytes - 1), 0x5a);
                let layout = Layout::from_size_align(bytes * 2, 16).unwrap();
                let shrunk = HugePages.realloc(grown, layout, bytes.div_ceil(2));
                assert_eq!(*shrunk, 0x5a);
                HugePages.dealloc(shrunk, Layout::from_size_align(bytes.div_ceil(2), 16).unwrap());
                let zeroed = HugePages.alloc_zeroed(layout);
                assert_eq!(*zeroed.add(bytes * 2 - 1), 0);
                HugePages.dealloc(zeroed, layout);
            }
        }
    }
}
