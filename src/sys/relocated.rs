//! What is only written while the program is loaded.

use nix::libc;

use super::memory::PAGE;

/// Makes what is only written while the program is loaded (tables of functions, addresses of constants) read-only: PT_GNU_RELRO,
/// elf(5). glibc and every dynamic loader do it before `main`; musl does not in a static program.
///
/// # Errors
/// As mprotect(2): no memory for one more mapping.
pub(crate) fn protect_relocated_data() -> nix::Result<()> {
    let mut result = 0;
    // SAFETY: the callback has the type that is asked for, and `result` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(protect_first), (&raw mut result).cast()) };
    nix::errno::Errno::result(result).map(|_| ())
}

/// The program itself comes first; others have a loader.
///
/// # Safety
/// As dl_iterate_phdr(3) calls it; `result` is a `c_int`.
#[allow(
    clippy::cast_possible_truncation,
    reason = "addresses of this very process"
)]
unsafe extern "C" fn protect_first(
    info: *mut libc::dl_phdr_info,
    _: libc::size_t,
    result: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the C library describes a program with as many headers as it says, which stay.
    let (base, headers) = unsafe {
        let info = &*info;
        let count = usize::from(info.dlpi_phnum);
        (
            info.dlpi_addr as usize,
            std::slice::from_raw_parts(info.dlpi_phdr, count),
        )
    };
    let relocated = headers
        .iter()
        .find(|header| header.p_type == libc::PT_GNU_RELRO);
    if let Some(header) = relocated {
        let start = base + header.p_vaddr as usize;
        // Variables begin on the page of its end, unless that is a page's own.
        let end = (start + header.p_memsz as usize) & !(PAGE - 1);
        let start = start & !(PAGE - 1);
        // SAFETY: the linker promises that nothing in these pages is written once the program is loaded.
        unsafe {
            *result.cast() =
                libc::mprotect(start as *mut libc::c_void, end - start, libc::PROT_READ);
        }
    }
    1
}
