//! Naming things in error messages: lists of what there is, and the nearest one.

/// The nearest of `known` to `wanted`, where it is near enough to be a slip of the finger.
pub(crate) fn nearest<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = wanted.to_lowercase();
    known
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&wanted, &name.to_lowercase()), name))
        .filter(|(similarity, _)| *similarity > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// `; did you mean "x"`, or nothing.
pub(crate) fn hint<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(wanted, known).map(|name| format!("; did you mean {name:?}")).unwrap_or_default()
}

/// At most twenty names, quoted, comma between.
pub(crate) fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const MOST: usize = 20;
    let mut shown = Vec::new();
    let mut more = 0;
    for name in names {
        if shown.len() < MOST {
            shown.push(format!("{name:?}"));
        } else {
            more += 1;
        }
    }
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    shown.join(", ") + &tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_slip_and_not_the_stranger() {
        assert_eq!(nearest("lable", ["text", "label"]), Some("label"));
        assert_eq!(nearest("Section", ["text", "section"]), Some("section"));
        assert_eq!(nearest("zebra", ["text", "label"]), None);
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..23).map(|n| n.to_string()).collect();
        assert!(list(names.iter().map(String::as_str)).ends_with("\"19\" and 3 more"));
    }
}
