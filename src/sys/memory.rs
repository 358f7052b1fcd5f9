//! The program's allocator: small blocks from one arena that grows as it is used, large ones from the kernel and back to it.
//!
//! A process that lives for one connection pays for each page that it touches, and copies it again after a fork. musl's
//! allocator makes some forty mappings in a start, glibc's keeps what it freed. Here neighbours share pages, and what is free
//! at the arena's end goes back to the kernel when [`give_back_free_memory`] is called.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::libc;
use talc::base::{CHUNK_UNIT, Talc, binning::Binning};
use talc::lock_api::{GuardSend, RawMutex};
use talc::source::Source;
use talc::{DefaultBinning, TalcLock, min_first_heap_size};

/// Blocks of this size and more have a mapping each: they are few, live long and come zeroed. So have the buffers of a
/// connection, which are gone when it is idle: between small blocks that stay they would leave gaps, and these take pages.
const LARGE: usize = 20 * 1024;
/// How much the arena grows at a time. Its last page is touched each time.
const STEP: usize = 16 * 1024;
/// How far the arena grows; after that more are made, of at least this size.
const ARENA: usize = 512 * 1024;
pub(super) const PAGE: usize = 4096;

/// Room in .bss: it takes no mapping of its own, and no memory until it is touched. Not on a page's boundary, so that its first
/// page is one with the other variables.
#[repr(C, align(32))]
struct Room(UnsafeCell<MaybeUninit<[u8; ARENA]>>);

// SAFETY: only the arena's source hands out parts of the room, each once.
unsafe impl Sync for Room {}

static ROOM: Room = Room(UnsafeCell::new(MaybeUninit::uninit()));
static SMALL: TalcLock<Spin, Growth> = TalcLock::new(Growth { end: None });

/// Takes turns. The program has one thread, so nobody ever waits.
struct Spin(AtomicBool);

// SAFETY: who gets `false` from the swap is alone until the store.
unsafe impl RawMutex for Spin {
    #[allow(
        clippy::declare_interior_mutable_const,
        reason = "the trait's way to make one"
    )]
    const INIT: Self = Self(AtomicBool::new(false));
    type GuardMarker = GuardSend;

    fn lock(&self) {
        while !self.try_lock() {
            std::hint::spin_loop();
        }
    }

    fn try_lock(&self) -> bool {
        !self.0.swap(true, Ordering::Acquire)
    }

    unsafe fn unlock(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Where small blocks come from.
#[derive(Debug)]
struct Growth {
    /// The end of the part of the room that is in use.
    end: Option<NonNull<u8>>,
}

// SAFETY: the pointer is into a static, and whoever holds the lock holds it alone.
unsafe impl Send for Growth {}

// SAFETY: it allocates from the kernel only, never from the allocator that it serves.
unsafe impl Source for Growth {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        let room = ROOM.0.get().cast::<u8>();
        let needed = layout.size() + layout.align() + 2 * CHUNK_UNIT;
        let (used, overhead) = match talc.source.end {
            Some(end) => (end.as_ptr() as usize - room as usize, 0),
            None => (0, min_first_heap_size::<DefaultBinning>()),
        };
        // To a page's boundary.
        let wanted =
            (room as usize + used + overhead + needed).next_multiple_of(STEP) - room as usize;
        if wanted <= ARENA {
            // SAFETY: from the room's start to `wanted`, of which `used` octets are this heap already.
            talc.source.end = unsafe {
                match talc.source.end {
                    Some(end) => Some(talc.extend(end, room.wrapping_add(wanted))),
                    None => talc.claim(room, wanted),
                }
            };
            return talc.source.end.map(|_| ()).ok_or(());
        }
        let size = (overhead + needed + PAGE).next_multiple_of(ARENA);
        let more = map(size).ok_or(())?;
        // SAFETY: the mapping is new, and is never taken back.
        unsafe { talc.claim(more.as_ptr(), size) }
            .map(|_| ())
            .ok_or(())
    }
}

/// The allocator, for the program to name as its global one.
#[derive(Debug)]
pub struct Allocator;

// SAFETY: each block comes from one of two allocators, and its size, which does not change in between, tells which.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return map(layout.size()).map_or(null_mut(), NonNull::as_ptr);
        }
        // SAFETY: as the caller promises.
        unsafe { SMALL.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        let block = unsafe { self.alloc(layout) };
        if !is_large(layout) && !block.is_null() {
            // SAFETY: the block is that long. (A mapping is zero already.)
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_large(layout) {
            // SAFETY: the block is a mapping of this length, and nobody uses it any more.
            unsafe { libc::munmap(block.cast(), layout.size()) };
            return;
        }
        // SAFETY: as the caller promises.
        unsafe { SMALL.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size is one that a layout may have.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (is_large(layout), is_large(new)) {
            // SAFETY: as the caller promises.
            (false, false) => unsafe { SMALL.realloc(block, layout, size) },
            (true, true) => {
                // SAFETY: the block is a mapping of this length, and the caller knows no place of it after this.
                let moved = unsafe {
                    libc::mremap(block.cast(), layout.size(), size, libc::MREMAP_MAYMOVE)
                };
                if moved == libc::MAP_FAILED {
                    null_mut()
                } else {
                    moved.cast()
                }
            }
            // SAFETY: two blocks, each as long as what is copied.
            _ => unsafe {
                let moved = self.alloc(new);
                if !moved.is_null() {
                    moved.copy_from_nonoverlapping(block, layout.size().min(size));
                    self.dealloc(block, layout);
                }
                moved
            },
        }
    }
}

/// A mapping is aligned to a page; what wants more is rare and small enough.
fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= PAGE
}

fn map(size: usize) -> Option<NonNull<u8>> {
    // SAFETY: a new private mapping touches nothing that is there.
    let place = unsafe {
        libc::mmap(
            null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if place == libc::MAP_FAILED {
        None
    } else {
        NonNull::new(place.cast())
    }
}

/// Gives the kernel the pages that are of no use now: dead stack, and what lies behind the last block in use. A saving: should
/// it fail, nothing is lost.
pub(crate) fn give_back_free_memory() {
    give_back_dead_stack();
    give_back_free_blocks();
}

/// An address on the stack of the thread that began with `main`.
static STACK: AtomicUsize = AtomicUsize::new(0);
/// How deep the program's stack is at most, by far; below it the kernel leaves a gap of at least this, since it may grow.
const STACK_DEPTH: usize = 128 * 1024;

/// What a system call's wrapper may have on the stack below its caller, by far.
const CALL: usize = 512;

/// Notes where the stack is. To be called from `main`, whose stack is the one that the kernel made.
pub(crate) fn note_stack() {
    STACK.store(here(), Ordering::Relaxed);
}

/// An address in the caller's frame or just below.
#[inline(never)]
fn here() -> usize {
    let local = 0_u8;
    std::hint::black_box(&raw const local) as usize
}

/// A handshake leaves 40 KiB of dead stack behind, ML-KEM's matrices for the most part.
#[inline(never)]
fn give_back_dead_stack() {
    let top = STACK.load(Ordering::Relaxed);
    let here = here();
    // Any other stack, a test's thread's for one, may have anything below it.
    if here > top || top - here > STACK_DEPTH {
        return;
    }
    let last = (here - CALL) & !(PAGE - 1);
    let first = last - STACK_DEPTH;
    // SAFETY: the stack grows down: nothing below the current frame and the call's is in use, and there is nothing but stack that deep.
    unsafe {
        libc::madvise(
            first as *mut libc::c_void,
            last - first,
            libc::MADV_DONTNEED,
        )
    };
}

fn give_back_free_blocks() {
    let mut small = SMALL.lock();
    let Some(end) = small.source.end else { return };
    // The page of the old end too: it may be one that was in use when the end was put there.
    let rest = (end.as_ptr() as usize).next_multiple_of(PAGE);
    let rest = rest.min(ROOM.0.get() as usize + ARENA);
    // SAFETY: `end` is the end of this heap, and is replaced by what it becomes. Nothing is in use behind that, to the room's end.
    unsafe {
        let top = small.reserved(end).up_to;
        small.source.end = small.truncate(end, top.as_ptr().wrapping_add(CHUNK_UNIT));
        if let Some(new) = small.source.end {
            discard(new.as_ptr() as usize, rest);
        }
    }
    give_back_gaps(&mut small);
}

/// The allocator does not tell where its gaps are, but asked for the longest block again and again it gives them all away.
fn give_back_gaps(small: &mut Talc<Growth, DefaultBinning>) {
    let mut blocks: [Option<(NonNull<u8>, Layout)>; 16] = [None; 16];
    let mut size = ARENA;
    for place in &mut blocks {
        *place = loop {
            let Ok(layout) = Layout::from_size_align(size, CHUNK_UNIT) else {
                break None;
            };
            if size < 2 * PAGE {
                break None;
            }
            // SAFETY: the size is not zero.
            if let Some(block) = unsafe { small.try_allocate(layout) } {
                break Some((block, layout));
            }
            size -= PAGE;
        };
    }
    for (block, layout) in blocks.into_iter().flatten() {
        let start = block.as_ptr() as usize;
        // SAFETY: the block is ours until it is given back. The allocator writes to a gap's ends alone, which are in the pages
        // that are kept: a gap begins where the block does, and ends behind it.
        unsafe {
            discard(start + CHUNK_UNIT, start + layout.size());
            small.deallocate(block.as_ptr(), layout);
        }
    }
}

/// Discards the whole pages between two addresses.
///
/// # Safety
/// What is there must not be in use.
unsafe fn discard(start: usize, end: usize) {
    let (first, last) = (start.next_multiple_of(PAGE), end & !(PAGE - 1));
    if first < last {
        // SAFETY: as the caller promises.
        unsafe {
            libc::madvise(
                first as *mut libc::c_void,
                last - first,
                libc::MADV_DONTNEED,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look like chance and are the same each time.
    struct Numbers(usize);

    impl Numbers {
        fn below(&mut self, limit: usize) -> usize {
            self.0 = (self.0 * 1_103_515_245 + 12_345) % (1 << 31);
            (self.0 >> 8) % limit
        }
    }

    struct Block {
        start: *mut u8,
        layout: Layout,
        fill: u8,
    }

    impl Block {
        fn make(size: usize, align: usize, fill: u8, zeroed: bool) -> Self {
            let layout = Layout::from_size_align(size, align).unwrap();
            // SAFETY: no size is zero.
            let start = unsafe {
                if zeroed {
                    Allocator.alloc_zeroed(layout)
                } else {
                    Allocator.alloc(layout)
                }
            };
            assert!(!start.is_null() && (start as usize) % align == 0);
            let mut block = Self {
                start,
                layout,
                fill: 0,
            };
            if zeroed {
                block.check();
            }
            block.refill(fill);
            block
        }

        fn bytes(&mut self) -> &mut [u8] {
            // SAFETY: the block is that long, and borrowed as this is.
            unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
        }

        fn refill(&mut self, fill: u8) {
            self.fill = fill;
            self.bytes().fill(fill);
        }

        fn check(&mut self) {
            let fill = self.fill;
            assert!(self.bytes().iter().all(|byte| *byte == fill));
        }

        fn resize(&mut self, size: usize) {
            // SAFETY: the block was made so, and no size is zero.
            let start = unsafe { Allocator.realloc(self.start, self.layout, size) };
            assert!(!start.is_null());
            let kept = self.layout.size().min(size);
            let fill = self.fill;
            self.start = start;
            self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
            assert!(self.bytes()[..kept].iter().all(|byte| *byte == fill));
            self.refill(fill);
        }

        fn free(mut self) {
            self.check();
            // SAFETY: the block was made so, and ends here.
            unsafe { Allocator.dealloc(self.start, self.layout) };
        }
    }

    #[test]
    fn blocks_keep_what_is_in_them_whatever_is_given_back_between() {
        let mut numbers = Numbers(1);
        let mut blocks = Vec::new();
        for round in 0..6000_usize {
            let size = 1 + match numbers.below(40) {
                0 => numbers.below(4 * LARGE),
                1..4 => numbers.below(20_000),
                _ => numbers.below(600),
            };
            match numbers.below(4) {
                0 | 1 => {
                    let align = 1 << numbers.below(6);
                    let fill = u8::try_from(round % 255).unwrap() + 1;
                    blocks.push(Block::make(size, align, fill, round % 3 == 0));
                }
                2 if !blocks.is_empty() => {
                    let at = numbers.below(blocks.len());
                    blocks[at].resize(size);
                }
                _ if !blocks.is_empty() => {
                    let at = numbers.below(blocks.len());
                    blocks.swap_remove(at).free();
                }
                _ => {}
            }
            // Grows beyond the arena, and shrinks to next to nothing.
            if round % 1500 == 1499 {
                blocks.drain(5..).for_each(Block::free);
            }
            if round % 50 == 0 {
                give_back_free_memory();
                blocks.iter_mut().for_each(Block::check);
            }
        }
        blocks.into_iter().for_each(Block::free);
        give_back_free_memory();
        let left = pages_in_memory();
        assert!(
            left <= 2,
            "{left} pages, where the lists of free blocks need one, or two where they begin at a page's end"
        );
    }

    /// How many pages of the room are not the kernel's to give to others (mincore(2) of memory that is nobody else's).
    fn pages_in_memory() -> usize {
        let start = ROOM.0.get().cast::<u8>();
        let first = start.wrapping_sub(start as usize % PAGE);
        let mut states = [0_u8; ARENA / PAGE];
        // SAFETY: the kernel writes an octet for each page.
        let result = unsafe { libc::mincore(first.cast(), ARENA, states.as_mut_ptr().cast()) };
        assert_eq!(result, 0);
        states.iter().filter(|state| **state & 1 != 0).count()
    }
}
