//! The program: the whole story is in the library.

fn main() -> std::process::ExitCode {
    imap_tls::main()
}
