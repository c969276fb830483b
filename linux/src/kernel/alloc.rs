// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory of the kernel: one value ([`KBox`]), a shared one ([`Ref`]), and many ([`KVec`]). Each
//! allocation may fail.
#![allow(unsafe_code, reason = "raw memory")]

use core::fmt;
use core::marker::PhantomData;
use core::mem::{self, MaybeUninit};
use core::ops::{Deref, DerefMut};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicUsize, Ordering, fence};

use super::ffi;

/// There is no free memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

impl From<NoMemory> for super::Errno {
    fn from(NoMemory: NoMemory) -> Self {
        Self::NO_MEMORY
    }
}

impl From<NoMemory> for vbus_driver::NoMemory {
    fn from(NoMemory: NoMemory) -> Self {
        Self
    }
}

impl From<NoMemory> for vbus_driver::Error {
    fn from(NoMemory: NoMemory) -> Self {
        Self::NoMemory
    }
}

/// Zeroed memory for `count` values of `T`. The caller may sleep.
fn alloc<T>(count: usize) -> Result<NonNull<T>, NoMemory> {
    let bytes = size_of::<T>().checked_mul(count).ok_or(NoMemory)?;
    if bytes == 0 {
        return Ok(NonNull::dangling());
    }
    // The kernel aligns every allocation to 8, and one whose size is a power of two to its size.
    let bytes = if align_of::<T>() > 8 {
        bytes.max(align_of::<T>()).checked_next_power_of_two().ok_or(NoMemory)?
    } else {
        bytes
    };
    const { assert!(align_of::<T>() <= 4096) };
    // SAFETY: it has no conditions, and the caller may sleep.
    let memory = unsafe { ffi::shim_alloc(bytes as u64) };
    NonNull::new(memory.cast()).ok_or(NoMemory)
}

/// Frees memory of [`alloc`].
///
/// # Safety
/// It came from `alloc` with the same `T` and `count`, and nobody uses it any more.
unsafe fn free<T>(memory: NonNull<T>, count: usize) {
    if size_of::<T>() * count != 0 {
        // SAFETY: by the caller's promise.
        unsafe { ffi::shim_free(memory.as_ptr().cast()) };
    }
}

/// A value in memory of its own.
pub struct KBox<T: ?Sized> {
    value: NonNull<T>,
    owns: PhantomData<T>,
}

// SAFETY: it owns its value, as a Box does.
unsafe impl<T: ?Sized + Send> Send for KBox<T> {}
// SAFETY: as above.
unsafe impl<T: ?Sized + Sync> Sync for KBox<T> {}

impl<T> KBox<T> {
    /// Puts `value` there. The caller may sleep.
    pub fn new(value: T) -> Result<Self, NoMemory> {
        let memory = alloc::<T>(1)?;
        // SAFETY: the memory is that of one value.
        unsafe { memory.write(value) };
        Ok(Self { value: memory, owns: PhantomData })
    }

    /// Memory whose value is to be written in place, as a whole or field by field:
    /// large values must not pass over the stack. It is zeroed.
    pub fn new_uninit() -> Result<KBox<MaybeUninit<T>>, NoMemory> {
        Ok(KBox { value: alloc::<T>(1)?.cast(), owns: PhantomData })
    }

    /// Takes the value out, and frees its memory.
    pub fn into_inner(self) -> T {
        let memory = self.value;
        mem::forget(self);
        // SAFETY: the value is valid, and is not used here again.
        let value = unsafe { memory.read() };
        // SAFETY: the memory is that of one value, and the value has left it.
        unsafe { free(memory, 1) };
        value
    }
}

impl<T> KBox<MaybeUninit<T>> {
    /// Takes the value for written.
    ///
    /// # Safety
    /// It is.
    pub unsafe fn assume_init(self) -> KBox<T> {
        let value = self.value.cast();
        mem::forget(self);
        KBox { value, owns: PhantomData }
    }
}

impl<T: ?Sized> KBox<T> {
    /// The value's address. Its memory is freed only by [`from_raw`](Self::from_raw).
    pub fn into_raw(self) -> *mut T {
        let value = self.value.as_ptr();
        mem::forget(self);
        value
    }

    /// The box of a value whose address [`into_raw`](Self::into_raw) returned. The type may be
    /// another one behind which the value stands: `dyn Trait` for `T`.
    ///
    /// # Safety
    /// The address is one of `into_raw`, and no other box has it.
    pub unsafe fn from_raw(value: *mut T) -> Self {
        // SAFETY: addresses of `into_raw` are not null.
        Self { value: unsafe { NonNull::new_unchecked(value) }, owns: PhantomData }
    }
}

impl<T: ?Sized> Deref for KBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the value is valid as long as the box.
        unsafe { self.value.as_ref() }
    }
}

impl<T: ?Sized> DerefMut for KBox<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and the box is borrowed alone.
        unsafe { self.value.as_mut() }
    }
}

impl<T: ?Sized> Drop for KBox<T> {
    fn drop(&mut self) {
        let bytes = size_of_val::<T>(self);
        // SAFETY: the value is valid, and is not used again.
        unsafe { ptr::drop_in_place(self.value.as_ptr()) };
        // SAFETY: the memory came from `alloc`, by which a value without bytes has none.
        unsafe { free(self.value.cast::<u8>(), bytes) };
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for KBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A shared value. Clones are handles to the same value, which is dropped with the last of them.
pub struct Ref<T> {
    shared: NonNull<Shared<T>>,
    owns: PhantomData<Shared<T>>,
}

struct Shared<T> {
    count: AtomicUsize,
    value: T,
}

// SAFETY: as for an Arc: handles in several threads share the value, and any may drop it.
unsafe impl<T: Send + Sync> Send for Ref<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Ref<T> {}

impl<T> Ref<T> {
    /// Puts `value` there. The caller may sleep.
    pub fn new(value: T) -> Result<Self, NoMemory> {
        let shared = KBox::new(Shared { count: AtomicUsize::new(1), value })?;
        // SAFETY: addresses of boxes are not null.
        let shared = unsafe { NonNull::new_unchecked(shared.into_raw()) };
        Ok(Self { shared, owns: PhantomData })
    }

    fn shared(&self) -> &Shared<T> {
        // SAFETY: this handle keeps the value.
        unsafe { self.shared.as_ref() }
    }
}

impl<T> Clone for Ref<T> {
    fn clone(&self) -> Self {
        // Relaxed: whoever clones has a handle, so the count is not 0 and nobody drops the value.
        let handles = self.shared().count.fetch_add(1, Ordering::Relaxed);
        assert!(handles < usize::MAX / 2, "handles are forgotten again and again");
        Self { shared: self.shared, owns: PhantomData }
    }
}

impl<T> Deref for Ref<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.shared().value
    }
}

impl<T> Drop for Ref<T> {
    fn drop(&mut self) {
        // Release: pairs with the fence below, in the thread that drops the last handle.
        if self.shared().count.fetch_sub(1, Ordering::Release) == 1 {
            // Pairs with the release of every other drop: what those threads did with the value is
            // done.
            fence(Ordering::Acquire);
            // SAFETY: this was the last handle.
            drop(unsafe { KBox::from_raw(self.shared.as_ptr()) });
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Ref<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// Values side by side.
pub struct KVec<T> {
    memory: NonNull<T>,
    capacity: usize,
    length: usize,
    owns: PhantomData<T>,
}

// SAFETY: it owns its values, as a Vec does.
unsafe impl<T: Send> Send for KVec<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for KVec<T> {}

impl<T> KVec<T> {
    /// None, and no memory yet.
    pub const fn new() -> Self {
        Self { memory: NonNull::dangling(), capacity: 0, length: 0, owns: PhantomData }
    }

    /// None, and memory for `capacity` of them. The caller may sleep.
    pub fn with_capacity(capacity: usize) -> Result<Self, NoMemory> {
        let mut vec = Self::new();
        vec.grow(capacity)?;
        Ok(vec)
    }

    /// `count` values: `value(0)`, `value(1)`, ... The caller may sleep.
    pub fn from_fn<E: From<NoMemory>>(
        count: usize,
        mut value: impl FnMut(usize) -> Result<T, E>,
    ) -> Result<Self, E> {
        let mut vec = Self::with_capacity(count)?;
        for n in 0..count {
            vec.push(value(n)?)?;
        }
        Ok(vec)
    }

    /// Adds a value at the end. If there is no memory for it, it is dropped. The caller may sleep,
    /// unless there is capacity for it.
    pub fn push(&mut self, value: T) -> Result<(), NoMemory> {
        if self.length == self.capacity {
            self.grow(self.capacity.checked_mul(2).ok_or(NoMemory)?.max(4))?;
        }
        // SAFETY: there is memory for more values than `length`.
        unsafe { self.memory.add(self.length).write(value) };
        self.length += 1;
        Ok(())
    }

    /// Takes the last value away.
    pub fn pop(&mut self) -> Option<T> {
        self.length = self.length.checked_sub(1)?;
        // SAFETY: there was a value, which is not used here again.
        Some(unsafe { self.memory.add(self.length).read() })
    }

    /// Takes the first value away for which `is_wanted` is true. The last value takes its place.
    /// Without values there is no memory.
    pub fn take_if(&mut self, is_wanted: impl FnMut(&T) -> bool) -> Option<T> {
        let at = self.iter().position(is_wanted)?;
        let last = self.length - 1;
        self.swap(at, last);
        let value = self.pop();
        if self.length == 0 {
            *self = Self::new();
        }
        value
    }

    /// Moves the values into memory for `capacity`, which is more than there is.
    fn grow(&mut self, capacity: usize) -> Result<(), NoMemory> {
        let memory = alloc::<T>(capacity)?;
        // SAFETY: both are memory for as many values, and do not overlap. The values are not used
        // at their former place again.
        unsafe { ptr::copy_nonoverlapping(self.memory.as_ptr(), memory.as_ptr(), self.length) };
        // SAFETY: it came from `alloc` with this capacity, or from nowhere.
        unsafe { free(self.memory, self.capacity) };
        (self.memory, self.capacity) = (memory, capacity);
        Ok(())
    }
}

impl<T> Default for KVec<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Deref for KVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: that many values are valid.
        unsafe { core::slice::from_raw_parts(self.memory.as_ptr(), self.length) }
    }
}

impl<T> DerefMut for KVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the vector is borrowed alone.
        unsafe { core::slice::from_raw_parts_mut(self.memory.as_ptr(), self.length) }
    }
}

impl<T> Drop for KVec<T> {
    fn drop(&mut self) {
        // SAFETY: the values are valid, and are not used again.
        unsafe { ptr::drop_in_place::<[T]>(&mut **self) };
        // SAFETY: it came from `alloc` with this capacity, or from nowhere.
        unsafe { free(self.memory, self.capacity) };
    }
}

impl<T: fmt::Debug> fmt::Debug for KVec<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
