//! What fuzz targets reach of the modules that are private (`--cfg fuzzing`, which cargo-fuzz sets; no other build has this).

pub use crate::activation::Addresses;
pub use crate::backend::door as launcher;
pub use crate::cli::door as options;
pub use crate::connector::door as connector;
pub use crate::imap::door as imap;
pub use crate::keeper::door as certificates;
pub use crate::relay::driven;
pub use crate::users::door as users;
