//! `bench`: rows are computed once, saved one by one, and reported. On the digits models.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;

use tch::Device;
use vitq::bench::matrix::{ArtifactPolicy, CalibrationChoice, Matrix, Selection};
use vitq::bench::runner::{Outcome, Position};
use vitq::bench::{Observer, Row, RowKey, Summary, report, run};
use vitq::calib::task::StemHeadPolicy;
use vitq::calib::{Progress, ProgressUpdate, RoleBits};
use vitq::error::Error;
use vitq::exec::Backend;
use vitq::quant::Precision;

use crate::reference::root;

/// Enough images for every class, few enough for a test.
const IMAGES: usize = 20;

fn demo(path: &str) -> PathBuf {
    root("demo").join(path)
}

fn matrix() -> Matrix {
    let bits = |bits| Precision::new(bits, "bits").unwrap();
    Matrix {
        checkpoints: vec![demo("checkpoints/digits-vit")],
        calibration: Some(CalibrationChoice {
            dataset: demo("datasets/digits/calib"),
            selection: Selection::Count(4),
        }),
        validation: demo("datasets/digits/val"),
        limit: Some(IMAGES),
        methods: vec!["float".to_owned(), "minmax".to_owned()],
        bits: vec![(bits(4), bits(4)), (bits(8), bits(8))],
        role_bits: RoleBits::default(),
        stem_heads: vec![StemHeadPolicy::Float],
        options: BTreeMap::new(),
        seeds: vec![0],
        executors: vec![Backend::Simulated],
        devices: vec![Device::Cpu],
        batch_sizes: vec![8],
        artifacts: ArtifactPolicy::Discard,
    }
}

/// Remembers which rows were computed, and can stop the run like Ctrl-C.
#[derive(Default)]
struct Recorder {
    computed: Mutex<Vec<RowKey>>,
    stop_after: Option<usize>,
}

impl Progress for Recorder {
    fn report(&self, _update: ProgressUpdate) {}

    fn is_cancelled(&self) -> bool {
        self.stop_after.is_some_and(|rows| self.computed.lock().unwrap().len() >= rows)
    }
}

impl Observer for Recorder {
    fn started(&self, _key: &RowKey, _position: Position) {}

    fn finished(&self, row: &Row, outcome: Outcome, position: Position) {
        assert!(position.row <= position.rows);
        if outcome == Outcome::Computed {
            self.computed.lock().unwrap().push(row.key.clone());
        }
    }
}

#[test]
fn a_second_run_computes_nothing_and_a_lost_row_is_computed_again() {
    let out = tempfile::tempdir().unwrap();
    let (results, summary) = run(&matrix(), out.path(), &Recorder::default()).unwrap();
    assert_eq!(summary, Summary { computed: 3, kept: 0 });
    let rows = results.rows().to_vec();
    assert_eq!(
        rows.iter().map(|row| row.key.bits()).collect::<Vec<_>>(),
        ["float", "w4a4", "w8a8"]
    );

    let (results, summary) = run(&matrix(), out.path(), &Recorder::default()).unwrap();
    assert_eq!(summary, Summary { computed: 0, kept: 3 });
    assert_eq!(results.rows(), rows);

    let file = out.path().join("results.json");
    let mut saved: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    saved.remove(1);
    std::fs::write(&file, serde_json::to_vec(&saved).unwrap()).unwrap();
    let recorder = Recorder::default();
    let (results, summary) = run(&matrix(), out.path(), &recorder).unwrap();
    assert_eq!(summary, Summary { computed: 1, kept: 2 });
    assert_eq!(*recorder.computed.lock().unwrap(), [rows[1].key.clone()]);
    let again = results.find(&rows[1].key).unwrap();
    assert_eq!((again.top1, again.sqnr_db), (rows[1].top1, rows[1].sqnr_db));
}

#[test]
fn a_stopped_run_goes_on_where_it_was() {
    let out = tempfile::tempdir().unwrap();
    let stopping = Recorder { stop_after: Some(2), ..Recorder::default() };
    assert!(matches!(run(&matrix(), out.path(), &stopping), Err(Error::Cancelled)));
    let (results, summary) = run(&matrix(), out.path(), &Recorder::default()).unwrap();
    assert_eq!(summary, Summary { computed: 1, kept: 2 });
    assert_eq!(results.rows().len(), 3);
}

#[test]
fn folders_named_by_labels_are_these_classes() {
    let (out, set) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for class in ["3", "7"] {
        let from = demo("datasets/digits/val").join(class);
        let to = set.path().join(class);
        std::fs::create_dir(&to).unwrap();
        for file in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap()).take(10) {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    let methods = vec!["float".to_owned()];
    let matrix = Matrix { methods, validation: set.path().to_owned(), ..matrix() };
    let (results, _) = run(&matrix, out.path(), &Recorder::default()).unwrap();
    assert!(results.rows()[0].top1 > 80.0, "{} %", results.rows()[0].top1);
}

#[test]
fn a_changed_question_is_a_new_row() {
    let out = tempfile::tempdir().unwrap();
    let only = |bits: usize| {
        let matrix = matrix();
        Matrix { methods: vec!["minmax".to_owned()], bits: vec![matrix.bits[bits]], ..matrix }
    };
    run(&only(1), out.path(), &Recorder::default()).unwrap();
    let changes: [fn(&mut Matrix); 6] = [
        |matrix| matrix.bits = vec![(matrix.bits[0].0, Precision::Float)],
        |matrix| matrix.role_bits.insert_text("fc2=4/8").unwrap(),
        |matrix| matrix.limit = Some(IMAGES - 10),
        |matrix| matrix.seeds = vec![1],
        |matrix| matrix.stem_heads = vec![StemHeadPolicy::Int8],
        |matrix| matrix.executors = vec![Backend::Float],
    ];
    for change in changes {
        let mut changed = only(1);
        change(&mut changed);
        let (_, summary) = run(&changed, out.path(), &Recorder::default()).unwrap();
        assert_eq!(summary, Summary { computed: 1, kept: 0 });
    }
}

#[test]
fn rows_hold_what_was_measured() {
    let out = tempfile::tempdir().unwrap();
    let (results, _) = run(&matrix(), out.path(), &Recorder::default()).unwrap();
    let [float, w4, w8] = results.rows() else { panic!("three rows") };
    assert_eq!((float.agreement, float.sqnr_db, float.key.seed), (100.0, None, None));
    assert!(float.top1 >= 90.0, "{}", float.top1);
    for row in [w4, w8] {
        assert_eq!((row.key.calibration_images, row.key.validation_images), (4, IMAGES));
        assert!(row.calibration_seconds > 0.0 && row.images_per_second > 0.0);
        assert!(row.artifact_bytes < float.artifact_bytes);
        assert_eq!(row.calibration_peak_bytes.is_some(), cfg!(target_os = "linux"));
    }
    // Stem and head stay float, all else has the nominal bits; nothing is found at run time.
    let cost = |row: &Row| row.bit_cost.unwrap();
    assert_eq!((cost(float).weight_bits, cost(float).activation_bits), (32.0, 32.0));
    for (row, bits) in [(w4, 4.0), (w8, 8.0)] {
        let found = cost(row);
        assert!(found.weight_bits > bits && found.weight_bits < bits + 0.5, "{found:?}");
        assert!(found.activation_bits > bits && found.activation_bits < bits + 0.5, "{found:?}");
        assert_eq!((found.metadata_bits, found.overhead_percent), (0.0, 0.0));
    }
    assert!(cost(w4).gbops < cost(w8).gbops && cost(w8).gbops < cost(float).gbops / 10.0);
    assert!(w8.sqnr_db > w4.sqnr_db, "{:?} {:?}", w8.sqnr_db, w4.sqnr_db);
    assert!(w4.artifact_bytes < w8.artifact_bytes);

    report::write(results.rows(), out.path()).unwrap();
    let read = |name: &str| std::fs::read_to_string(out.path().join(name)).unwrap();
    assert_eq!(read("results.csv").lines().count(), 4);
    assert!(read("table.md").contains(&format!("| Full precision | 32/32 | {:.2} |", float.top1)));
    assert!(read("accuracy.svg").contains("w8a8"));
}

#[test]
fn logits_of_a_row_do_not_depend_on_its_batch_size() {
    let out = tempfile::tempdir().unwrap();
    let matrix = Matrix { batch_sizes: vec![1, 7], bits: vec![matrix().bits[0]], ..matrix() };
    let (results, summary) = run(&matrix, out.path(), &Recorder::default()).unwrap();
    assert_eq!(summary.computed, 4);
    let quantized: Vec<&Row> = results.rows().iter().filter(|row| !row.key.is_float()).collect();
    assert_eq!(quantized[0].sqnr_db, quantized[1].sqnr_db);
    assert_eq!(quantized[0].calibration_seconds, quantized[1].calibration_seconds);
}

#[test]
fn kept_artifacts_are_computed_again_when_they_are_gone() {
    let out = tempfile::tempdir().unwrap();
    let matrix = Matrix {
        methods: vec!["minmax".to_owned()],
        bits: vec![matrix().bits[1]],
        artifacts: ArtifactPolicy::Keep,
        ..matrix()
    };
    let (results, _) = run(&matrix, out.path(), &Recorder::default()).unwrap();
    let file = out.path().join("artifacts").join(results.rows()[0].artifact.as_ref().unwrap());
    let bytes = std::fs::read(&file).unwrap();
    assert_eq!(bytes.len() as u64, results.rows()[0].artifact_bytes);
    let map = std::fs::read_to_string(file.with_extension("svg")).unwrap();
    assert!(map.contains("digits-vit, minmax w8a8") && map.contains("blocks.5"), "{map}");
    std::fs::remove_file(&file).unwrap();
    let (_, summary) = run(&matrix, out.path(), &Recorder::default()).unwrap();
    assert_eq!(summary, Summary { computed: 1, kept: 0 });
    assert_eq!(std::fs::read(&file).unwrap(), bytes);
}

#[test]
fn an_unusable_matrix_is_refused_before_anything_is_computed() {
    type Change = fn(&mut Matrix);
    let changes: [(&str, Change); 5] = [
        ("method", |matrix| matrix.methods.push("gptq".to_owned())),
        ("options.nope", |matrix| drop(matrix.options.insert("nope".into(), "1".into()))),
        ("calib", |matrix| matrix.calibration = None),
        ("calib_images", |matrix| {
            if let Some(choice) = &mut matrix.calibration {
                choice.selection = Selection::Count(10_000);
            }
        }),
        ("calib_files", |matrix| {
            if let Some(choice) = &mut matrix.calibration {
                choice.selection = Selection::Listed(vec!["0/none.png".to_owned()]);
            }
        }),
    ];
    for (expected, change) in changes {
        let out = tempfile::tempdir().unwrap();
        let mut matrix = matrix();
        change(&mut matrix);
        let error = run(&matrix, out.path(), &Recorder::default()).unwrap_err();
        let Error::InvalidArgument { field, .. } = error else { panic!("{expected}: {error}") };
        assert_eq!(field, expected);
        assert!(!out.path().join("results.json").exists(), "{expected}");
    }
}
