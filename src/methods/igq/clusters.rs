//! The static groups of an operand: k-means of extents in the (lo, hi) plane (methods/igq-vit.md,
//! section 3).
//!
//! Alternates two exact minimizations of Σ (hi − u_π)² + (lo − l_π)²: every point to its nearest group,
//! every group to the mean of its points. Equal-count bins of the width hi − lo are the start.

/// Most alternations; a few suffice (the paper), the limit keeps ties from going on for ever.
const MAX_STEPS: usize = 20;

/// Smallest and largest value of a part of an operand: a channel of an image, a row of scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Extent {
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Extent {
    /// (hi − u)² + (lo − l)², the paper's distance between a channel and a quantizer.
    fn distance(self, other: Self) -> f64 {
        (self.high - other.high).powi(2) + (self.low - other.low).powi(2)
    }

    fn width(self) -> f64 {
        self.high - self.low
    }
}

/// One group of extents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cluster {
    /// Mean of the members: what an extent is compared with.
    pub(super) mean: Extent,
    /// Smallest extent that holds all members.
    pub(super) hull: Extent,
}

/// At most `count` groups of `points`: as many as there are distinct points if these are fewer.
pub(super) fn cluster(points: &[Extent], count: usize) -> Vec<Cluster> {
    let mut means = initial_means(points, count);
    let mut members = vec![usize::MAX; points.len()];
    for _ in 0..MAX_STEPS {
        let previous = std::mem::take(&mut members);
        members = points.iter().map(|point| nearest(&means, *point)).collect();
        if members == previous {
            break;
        }
        means = mean_of_members(points, &members, means.len());
    }
    hulls(points, &means)
}

/// Means of `count` bins of equally many points, in the order of their widths.
fn initial_means(points: &[Extent], count: usize) -> Vec<Extent> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| {
        let order = a.width().total_cmp(&b.width());
        order.then(a.high.total_cmp(&b.high))
    });
    let bins = count.min(points.len());
    let bin = |index: usize| index * sorted.len() / bins..(index + 1) * sorted.len() / bins;
    (0..bins).map(|index| mean(sorted[bin(index)].iter())).collect()
}

/// Index of the nearest group; the lowest of equals.
fn nearest(means: &[Extent], point: Extent) -> usize {
    let mut best = (0, f64::INFINITY);
    for (index, mean) in means.iter().enumerate() {
        let distance = point.distance(*mean);
        if distance < best.1 {
            best = (index, distance);
        }
    }
    best.0
}

/// The groups' new means. A group without members starts anew at the point that is farthest from its
/// own group; it is dropped when every point lies at the mean of its group.
fn mean_of_members(points: &[Extent], members: &[usize], count: usize) -> Vec<Extent> {
    let mut sums = vec![(Extent { low: 0.0, high: 0.0 }, 0usize); count];
    for (point, member) in points.iter().zip(members) {
        let (sum, size) = &mut sums[*member];
        *sum = Extent { low: sum.low + point.low, high: sum.high + point.high };
        *size += 1;
    }
    let mut means: Vec<Extent> = sums
        .iter()
        .filter(|(_, size)| *size > 0)
        .map(|(sum, size)| Extent { low: sum.low / *size as f64, high: sum.high / *size as f64 })
        .collect();
    while means.len() < count {
        let distance = |point: &Extent| point.distance(means[nearest(&means, *point)]);
        let farthest = points.iter().map(|point| (distance(point), *point));
        match farthest.max_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((distance, point)) if distance > 0.0 => means.push(point),
            _ => break,
        }
    }
    means
}

/// The groups with their members' common extent; groups that nobody is nearest to disappear.
fn hulls(points: &[Extent], means: &[Extent]) -> Vec<Cluster> {
    let mut hulls: Vec<Option<Extent>> = vec![None; means.len()];
    for point in points {
        let hull = hulls[nearest(means, *point)].get_or_insert(*point);
        *hull = Extent { low: hull.low.min(point.low), high: hull.high.max(point.high) };
    }
    let pairs = means.iter().zip(hulls);
    pairs.filter_map(|(mean, hull)| hull.map(|hull| Cluster { mean: *mean, hull })).collect()
}

fn mean<'a>(points: impl ExactSizeIterator<Item = &'a Extent>) -> Extent {
    let count = points.len() as f64;
    let sum = points.fold((0.0, 0.0), |sum, point| (sum.0 + point.low, sum.1 + point.high));
    Extent { low: sum.0 / count, high: sum.1 / count }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(pairs: &[(f64, f64)]) -> Vec<Extent> {
        pairs.iter().map(|(low, high)| Extent { low: *low, high: *high }).collect()
    }

    fn means(clusters: &[Cluster]) -> Vec<(f64, f64)> {
        clusters.iter().map(|cluster| (cluster.mean.low, cluster.mean.high)).collect()
    }

    #[test]
    fn separate_clouds_become_groups_with_means_and_hulls() {
        let points = extents(&[
            (-1.0, 1.0),
            (-10.0, 2.0),
            (-1.2, 1.4),
            (-2.0, 20.0),
            (-0.8, 1.2),
            (-12.0, 2.0),
            (-2.0, 22.0),
        ]);
        let found = cluster(&points, 3);
        let expected = [(-1.0, 1.2), (-11.0, 2.0), (-2.0, 21.0)];
        assert_eq!(found.len(), 3);
        for ((low, high), (found_low, found_high)) in expected.iter().zip(means(&found)) {
            assert!((low - found_low).abs() < 1e-12 && (high - found_high).abs() < 1e-12);
        }
        assert_eq!(found[0].hull, Extent { low: -1.2, high: 1.4 });
        assert_eq!(found[2].hull, Extent { low: -2.0, high: 22.0 });
    }

    #[test]
    fn equal_widths_at_different_places_are_told_apart() {
        // The start sees widths only; the distance sees both ends.
        let points = extents(&[(0.0, 1.0), (5.0, 6.0), (0.1, 1.1), (5.1, 6.1)]);
        let found = cluster(&points, 2);
        assert_eq!(found.len(), 2);
        assert!((found[0].mean.low - found[1].mean.low).abs() > 4.9);
    }

    #[test]
    fn an_empty_group_starts_anew_at_the_farthest_point() {
        // The first two bins have one mean: all their points go to the first group.
        let points = extents(&[(0.0, 1.0); 8].map(|point| point));
        let mut points = points;
        points.extend(extents(&[(0.0, 2.0), (0.0, 2.2), (0.0, 9.0), (0.0, 2.1)]));
        let found = cluster(&points, 3);
        assert_eq!(found.len(), 3);
        let highs: Vec<f64> = means(&found).iter().map(|mean| mean.1).collect();
        assert!((highs[0] - 1.0).abs() < 1e-12);
        assert!(highs.iter().any(|high| (high - 2.1).abs() < 1e-9), "{highs:?}");
        assert!(highs.contains(&9.0), "{highs:?}");
    }

    #[test]
    fn duplicates_are_merged() {
        assert_eq!(cluster(&extents(&[(-3.0, 4.0); 6]), 4).len(), 1);
        assert_eq!(cluster(&extents(&[(0.0, 0.0)]), 8).len(), 1);
        let two = extents(&[(-3.0, 4.0), (0.0, 1.0), (-3.0, 4.0), (0.0, 1.0)]);
        assert_eq!(means(&cluster(&two, 8)), [(0.0, 1.0), (-3.0, 4.0)]);
    }

    #[test]
    fn more_groups_never_fit_worse() {
        let wave = |i: u32| (f64::from(i) * 12.9898).sin() * 43_758.545_3;
        let points: Vec<Extent> = (0..300)
            .map(|i| Extent { low: -wave(i).fract().abs(), high: wave(i + 7).fract().abs() * 3.0 })
            .collect();
        let error = |count| -> f64 {
            let means: Vec<Extent> = cluster(&points, count).iter().map(|c| c.mean).collect();
            points.iter().map(|point| point.distance(means[nearest(&means, *point)])).sum()
        };
        let errors: Vec<f64> = [1, 2, 4, 8, 16].map(error).into();
        assert!(errors.windows(2).all(|pair| pair[1] < pair[0]), "{errors:?}");
    }

    #[test]
    fn huge_values_keep_their_places() {
        let points = extents(&[(-1e30, 1e30), (0.0, 1.0), (-1.0, 1.0), (0.0, 1e6)]);
        let found = cluster(&points, 2);
        assert_eq!(found.len(), 2);
        assert!(found.iter().any(|cluster| cluster.mean == points[0]));
    }
}
