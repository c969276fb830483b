//! vbus-shm's own sources, compiled again with one thing changed: what does it bring?

macro_rules! sources {
    () => {
        #[path = "/work/main/crates/vbus-shm/src/copy.rs"]
        pub mod copy;
        #[path = "/work/main/crates/vbus-shm/src/memory.rs"]
        pub mod memory;
        #[path = "/work/main/crates/vbus-shm/src/ring.rs"]
        pub mod ring;
        #[path = "/work/main/crates/vbus-shm/src/signal.rs"]
        pub mod signal;
        #[path = "/work/main/crates/vbus-shm/src/state.rs"]
        pub mod state;
    };
}

macro_rules! variant {
    ($name:ident, $at:ident, $fence:expr) => {
        pub mod $name {
            sources!();
            pub mod sync {
                pub use vbus_shm::sync::{Edge, Fence, Ordering, Word, observe, publish};
                #[inline(always)]
                pub fn fence($at: Fence) {
                    $fence
                }
            }
        }
    };
}


/// Two arrays instead of one.
pub mod two_arrays {
    #[path = "ring.rs"]
    pub mod ring;
    #[path = "/work/main/crates/vbus-shm/src/memory.rs"]
    mod memory;
    pub use vbus_shm::{signal, sync};
}

variant!(nofence, _at, std::sync::atomic::compiler_fence(Ordering::SeqCst));
