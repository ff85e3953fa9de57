//! The protos themselves: everything is explained, and a zero value means "absent".

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use prost_reflect::{DescriptorPool, FileDescriptor};
use std::collections::BTreeMap;
use thaw_proto::FILE_DESCRIPTOR_SET;

fn files() -> Vec<FileDescriptor> {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).unwrap();
    pool.files().filter(|file| file.package_name() == "thaw.v1").collect()
}

/// Comment before each element of a file, by its source path.
fn comments(file: &FileDescriptor) -> BTreeMap<Vec<i32>, String> {
    let source = file.file_descriptor_proto().source_code_info.clone().unwrap();
    source.location.into_iter().map(|location| (location.path, location.leading_comments.unwrap_or_default())).collect()
}

#[test]
fn every_field_has_a_comment() {
    let mut without = Vec::new();
    for file in files() {
        let comments = comments(&file);
        for message in file.messages() {
            for field in message.fields() {
                if comments.get(field.path()).is_none_or(|comment| comment.trim().is_empty()) {
                    without.push(field.full_name().to_owned());
                }
            }
        }
    }
    assert!(without.is_empty(), "fields without a comment: {without:#?}");
}

#[test]
fn every_enums_zero_value_is_unspecified() {
    for file in files() {
        for choices in file.enums() {
            let zero = choices.get_value(0).unwrap();
            assert!(zero.name().ends_with("_UNSPECIFIED"), "{}", zero.full_name());
            let prefix = zero.name().strip_suffix("UNSPECIFIED").unwrap();
            for value in choices.values() {
                assert!(value.name().starts_with(prefix), "{} does not start with {prefix}", value.full_name());
            }
        }
    }
}
