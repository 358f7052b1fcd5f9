//! The program: the whole story is in the library.

fn main() {
    imap_tls::main()
}
