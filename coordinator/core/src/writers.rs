//! Which rank writes which part of a checkpoint.

/// The rank that writes each of the states with these sizes: the largest first, each to the rank that has least.
///
/// # Panics
/// With a `world_size` of 0.
#[must_use]
pub fn assign(bytes: &[u64], world_size: u32) -> Vec<u32> {
    let mut order: Vec<usize> = (0..bytes.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(bytes[index]), index));
    let mut load = vec![0_u64; world_size as usize];
    let mut ranks = vec![0; bytes.len()];
    for index in order {
        let least = (0..world_size).min_by_key(|&rank| load[rank as usize]).expect("a gang has a rank");
        load[least as usize] += bytes[index];
        ranks[index] = least;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_and_the_same_for_everyone() {
        let bytes = [90, 28, 28, 28, 28, 2];
        assert_eq!(assign(&bytes, 2), [0, 1, 1, 1, 1, 0]);
        assert_eq!(assign(&bytes, 1), [0; 6]);
        assert_eq!(assign(&[], 3), [0_u32; 0]);
        assert_eq!(assign(&[5, 5, 5], 5), [0, 1, 2]);
    }
}
