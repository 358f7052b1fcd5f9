//! The program: the whole story is in the library.

#[global_allocator]
static ALLOCATOR: imap_tls::Allocator = imap_tls::Allocator;

fn main() {
    imap_tls::main()
}
