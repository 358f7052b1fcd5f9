//! The program's allocator: small blocks from one arena that grows as it is used, large ones from the kernel and back to it.
//!
//! A process that lives for one connection pays for each page that it touches, and copies it again after a fork. musl's
//! allocator makes some forty mappings in a start, glibc's keeps what it freed. Here neighbours share pages, and what is free
//! at the arena's end goes back to the kernel when [`give_back_free_memory`] is called.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc;
use talc::base::{CHUNK_UNIT, Talc, binning::Binning};
use talc::lock_api::{GuardSend, RawMutex};
use talc::source::Source;
use talc::{DefaultBinning, TalcLock, min_first_heap_size};

/// Blocks of this size and more have a mapping each: they are few, live long and come zeroed.
const LARGE: usize = 64 * 1024;
/// How much the arena grows at a time. Its last page is touched each time.
const STEP: usize = 16 * 1024;
/// How far the arena grows; after that more are made, of at least this size.
const ARENA: usize = 512 * 1024;
const PAGE: usize = 4096;

/// Room in .bss: it takes no mapping of its own, and no memory until it is touched.
#[repr(C, align(4096))]
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
        let wanted = (used + overhead + needed).next_multiple_of(STEP);
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

/// Gives the kernel the pages behind the last block in use. A saving: should it fail, nothing is lost.
pub(crate) fn give_back_free_memory() {
    let mut small = SMALL.lock();
    let Some(end) = small.source.end else { return };
    // SAFETY: `end` is the end of this heap, and is replaced by what it becomes. Nothing is in use behind that.
    unsafe {
        let top = small.reserved(end).up_to;
        let kept = top.as_ptr().wrapping_add(CHUNK_UNIT);
        small.source.end = small.truncate(end, kept);
        let Some(new) = small.source.end else { return };
        let first = (new.as_ptr() as usize).next_multiple_of(PAGE);
        let last = (end.as_ptr() as usize).next_multiple_of(PAGE);
        if first < last {
            libc::madvise(
                first as *mut libc::c_void,
                last - first,
                libc::MADV_DONTNEED,
            );
        }
    }
}
