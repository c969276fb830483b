//! `state`: named values (spec/state.md).
